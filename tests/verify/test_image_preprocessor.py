"""Test the gate on a bundle's image preprocessor with at least forty image sizes, and that it can fail."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import pytest

from builder.checkpoint.load import open_checkpoint
from builder.graph.image_preprocessor import resize
from builder.targets.config_files import vision_processor
from builder.targets.image_preprocessor import NAME, image_preprocessor_graph
from builder.targets.runners.registry import RUNTIMES
from builder.verify.image_preprocessor import PLACE, SIZES, golden_preprocessor_gates, preprocessor_gates
from builder.verify.self_test.mutations import preprocessor_brighter
from tests.helpers.checkpoints import MINIATURE
from tests.helpers.image_sizes import SIZES as MANY
from tests.helpers.runtimes import require_openvino

if TYPE_CHECKING:
    from builder.reference.model import Reference

# transformers' own rounding misses an integer square root, which a runtime without float64 does not.
ROOTS = {(343, 7)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The part of a bundle that the gate needs."""
    write(tmp_path)
    return tmp_path


def write(folder: Path) -> None:
    onnx.save(image_preprocessor_graph(open_checkpoint(MINIATURE), None)[NAME], folder / f"{NAME}.onnx")


@pytest.mark.torch
def test_values_are_equal_in_onnxruntime(folder: Path, reference: Reference) -> None:
    gates = preprocessor_gates(folder, "onnxruntime", reference, MANY)
    assert len(gates) == len(MANY) >= 40
    assert {(gate.place, gate.measured, gate.limit) for gate in gates} == {(PLACE, 0.0, 0.0)}


@pytest.mark.torch
def test_values_differ_by_at_most_one_step_in_openvino(folder: Path, reference: Reference) -> None:
    require_openvino()
    sizes = [size for size in MANY if size not in ROOTS]
    gates = preprocessor_gates(folder, "openvino", reference, sizes)
    assert len(gates) >= 40
    assert all(gate.ok and gate.limit == RUNTIMES["openvino"].tolerance for gate in gates)
    assert 1.001 > max(gate.measured for gate in gates) > 0.9, "OpenVINO now has float64: set the limit to 0"


def other_filter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize, "SHARPNESS", -0.75)
    write(folder)


def other_bound(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(MINIATURE)
    size = checkpoint.preprocessor["size"]
    monkeypatch.setitem(size, "longest_edge", size["longest_edge"] // 2)
    onnx.save(image_preprocessor_graph(checkpoint, None)[NAME], folder / f"{NAME}.onnx")


@pytest.mark.torch
@pytest.mark.parametrize(
    "spoil",
    [lambda folder, _: preprocessor_brighter(folder, "onnxruntime"), other_filter, other_bound],
    ids=["1 % brighter", "another filter", "another bound"],
)
def test_a_broken_preprocessor_fails(
    spoil: Callable[[Path, pytest.MonkeyPatch], None],
    folder: Path,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(folder, monkeypatch)
    gates = preprocessor_gates(folder, "onnxruntime", reference)
    assert len(gates) == len(SIZES)
    failing = [gate for gate in gates if not gate.ok]
    assert any(gate.measured > 1 for gate in failing)
    if spoil is other_bound:
        assert any(math.isinf(gate.measured) and "grid" in gate.detail for gate in failing)


@pytest.mark.torch
def test_a_bundle_without_a_preprocessor_has_no_gate(tmp_path: Path, reference: Reference) -> None:
    assert preprocessor_gates(tmp_path, "genai", reference) == []


def test_without_torch_it_is_compared_with_the_clients_preprocessing(folder: Path, tmp_path: Path) -> None:
    from builder.targets.clients.pipeline import read_image_settings

    settings = tmp_path / "vision_processor.json"
    settings.write_text(vision_processor(open_checkpoint(MINIATURE)))
    gates = golden_preprocessor_gates(folder, "onnxruntime", read_image_settings(settings))
    assert [gate.measured for gate in gates] == [0.0] * len(SIZES)
    shutil.copyfile(MINIATURE / "config.json", folder / f"{NAME}.onnx")
    (gate,) = golden_preprocessor_gates(folder, "onnxruntime", read_image_settings(settings))
    assert math.isinf(gate.measured)
