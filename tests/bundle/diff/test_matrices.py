"""`diff` of quantized matrices: compared as their operators read them, for all bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from builder.bundle.diff import matrices as module
from builder.bundle.diff.diff import diff
from builder.bundle.diff.matrices import matrices
from builder.bundle.diff.weights import WeightChange
from builder.quantization.blockwise import Blocks, Rows, dequantize, quantize
from builder.quantization.packing import packed_parts
from tests.helpers.bundles import relisted, small_bundle

ROWS, COLUMNS = 48, 64
FORMATS = {
    "int4": Blocks(4, 32),
    "int4 with zero points": Blocks(4, 16, True),
    "int8": Blocks(8, 64),
    "turned": Blocks(8, COLUMNS),
}


def rows(seed: int = 0) -> Rows:
    return np.random.default_rng(seed).standard_normal((ROWS, COLUMNS), np.float32)


def model(values: Rows, blocks: Blocks, turned: bool = False, scale: float = 1.0) -> onnx.ModelProto:
    """A matmul with a quantized matrix, with the names that builds give to its parts."""
    quantized = quantize(values, blocks)
    parts = packed_parts(quantized, blocks, "float32")
    parts["scales"] = np.multiply(parts["scales"], np.float32(scale), dtype=np.float32)
    levels = parts["levels"]
    parts["levels"] = levels.T.copy() if turned else levels.reshape(ROWS, COLUMNS // blocks.size, -1)
    parts["scales"] = parts["scales"].reshape(-1) if turned else parts["scales"]
    tensors = [numpy_helper.from_array(np.asarray(part), f"w.{name}") for name, part in parts.items()]
    names = [tensor.name for tensor in tensors]
    if turned:
        middle = helper.make_node("Constant", [], ["zero"], value=numpy_helper.from_array(np.array(128, np.uint8)))
        product = helper.make_node("DynamicQuantizeMatMul", ["x", *names, "zero"], ["y"], domain="com.microsoft")
        nodes = [middle, product]
    else:
        facts: dict[str, Any] = {"K": COLUMNS, "N": ROWS, "bits": blocks.bits, "block_size": blocks.size}
        nodes = [helper.make_node("MatMulNBits", ["x", *names], ["y"], domain="com.microsoft", **facts)]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", w]) for n, w in (("x", COLUMNS), ("y", ROWS)))
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], tensors), opset_imports=opsets, ir_version=9)


def bundle(folder: Path, made: onnx.ModelProto) -> Path:
    small_bundle(folder)
    (folder / "model.onnx.data").unlink()
    onnx.save_model(made, folder / "model.onnx", save_as_external_data=True, location="w.onnx.data", size_threshold=64)
    relisted(folder)
    return folder


def changes(tmp_path: Path, one: onnx.ModelProto, other: onnx.ModelProto) -> tuple[WeightChange, ...]:
    return diff(bundle(tmp_path / "one", one), bundle(tmp_path / "other", other)).weights


@pytest.mark.parametrize("name", FORMATS)
def test_errors_are_those_of_the_dequantized_matrices(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COUNT", 5 * COLUMNS)  # rows come in pieces
    blocks = FORMATS[name]
    (found,) = changes(tmp_path, model(rows(), Blocks(4, 64)), model(rows(), blocks, turned=name == "turned"))
    a, b = (dequantize(quantize(rows(), format)).astype(np.float64) for format in (Blocks(4, 64), blocks))
    assert (found.graph, found.name) == ("model.onnx", "w")
    assert found.largest == pytest.approx(np.abs(a - b).max() / a.std())
    assert found.rms == pytest.approx(np.sqrt(np.square(a - b).mean() / np.square(a).mean()))


@pytest.mark.parametrize("name", FORMATS)
def test_equal_matrices_are_not_a_change(tmp_path: Path, name: str) -> None:
    one, other = (bundle(tmp_path / n, model(rows(), FORMATS[name], name == "turned")) for n in ("one", "other"))
    found = diff(one, other)
    assert found.equal
    assert found.compared == 1


def test_scales_alone_are_a_change(tmp_path: Path) -> None:
    (found,) = changes(tmp_path, model(rows(), Blocks(4, 32)), model(rows(), Blocks(4, 32), scale=1.01))
    assert found.digests[0] == found.digests[1]  # of the levels
    assert found.rms == pytest.approx(0.01, rel=1e-3)


def fewer_scales(made: onnx.ModelProto) -> None:
    made.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.ones((ROWS, 1), np.float32), "w.scales"))


def no_bits(made: onnx.ModelProto) -> None:
    (bits,) = [one for one in made.graph.node[0].attribute if one.name == "bits"]
    bits.i = 0


def huge_blocks(made: onnx.ModelProto) -> None:
    (size,) = [one for one in made.graph.node[0].attribute if one.name == "block_size"]
    size.i = 2**60


@pytest.mark.parametrize("change", [fewer_scales, no_bits, huge_blocks])
def test_parts_that_do_not_fit_are_compared_one_by_one(
    tmp_path: Path, change: Callable[[onnx.ModelProto], None]
) -> None:
    wrong = model(rows(1), Blocks(4, 32))
    change(wrong)
    assert matrices(wrong, tmp_path) == {}
    found = changes(tmp_path, model(rows(), Blocks(4, 32)), wrong)
    assert {change.name for change in found} == {"w.levels", "w.scales"}
