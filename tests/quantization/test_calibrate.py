"""calibrate: on PyTorch's residual streams, a layer at a time, and better than rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from builder.checkpoint.load import Checkpoint, open_checkpoint
from builder.quantization import calibrate
from builder.quantization.blockwise import Blocks, dequantize, quantize
from builder.quantization.rules import Rule, WeightFormat, resolve
from builder.reference import cases
from builder.reference.cases import shipped_cases
from builder.reference.model import Reference
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.random_models import Array

pytestmark = pytest.mark.torch

RULES = (Rule(("model.language_model.*",), "int4", 32, search="gptq"),)
LAYERS = calibrate.LAYERS


@pytest.fixture(scope="module")
def random(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Three layers, two DeepStack levels, an untied head."""
    text = {"num_hidden_layers": 3, "num_attention_heads": 6}
    folder = tmp_path_factory.mktemp("calibrate") / "random"
    return open_checkpoint(write_checkpoint(folder, seed=3, text=text, deepstack=(1, 2), tied=False))


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cases; held-out ones cannot be read."""

    def refused(*_: Any) -> None:
        raise AssertionError("the held-out set is read")

    few = tuple(case for case in shipped_cases() if case.name in ("text", "one image"))
    monkeypatch.setattr(cases, "held_out", refused)
    monkeypatch.setattr(calibrate, "suite_cases", lambda checkpoint, folder: few)


@pytest.fixture
def hessians(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], Array]:
    """Filled by calibration: the matrices of an input → its Hessian."""
    found: dict[tuple[str, ...], Array] = {}
    original = calibrate._hessians

    def noted(*arguments: Any) -> dict[int, tuple[list[str], Array]]:
        result = original(*arguments)
        found.update({tuple(names): matrix.copy() for names, matrix in result.values()})
        return result

    monkeypatch.setattr(calibrate, "_hessians", noted)
    return found


def weight_formats(checkpoint: Checkpoint, *rules: Rule) -> dict[str, WeightFormat]:
    return resolve(rules or RULES, checkpoint.tensors)


def test_matmuls_lose_less_than_with_rounding(
    random: Checkpoint, hessians: dict[tuple[str, ...], Array], tmp_path: Path
) -> None:
    """tr(E H Eᵀ), the mean squared error of the matmuls with the calibration inputs."""
    ticks: list[int] = []
    files = calibrate.calibrated(random, weight_formats(random), tmp_path, lambda: ticks.append(1))
    assert len(ticks) == random.text.layers + 1
    weights = load_file(random.folder / "model.safetensors")
    matrices = [(name, given) for names, given in hessians.items() for name in names]
    assert len(matrices) == 7 * random.text.layers
    for name, given in matrices:
        weight = weights[name].astype(np.float32)

        def lost(matrix: Array, weight: Array = weight, given: Array = given) -> float:
            error = (matrix - weight).astype(np.float64)
            return float(np.einsum("ij,jk,ik->", error, given, error))

        rounded = dequantize(quantize(weight, Blocks(4, 32, search="mse")))
        assert lost(dequantize(calibrate.load(files[name]))) < 0.9 * lost(rounded), name


def test_every_wanted_matrix_is_written_in_its_format(random: Checkpoint, tmp_path: Path) -> None:
    rules = (Rule((f"{LAYERS}.1.mlp.*", "lm_head.weight"), "int4", 16, zero_points=True, search="gptq"),)
    wanted = weight_formats(random, *rules, Rule(("model.language_model.*",), "int8"))
    files = calibrate.calibrated(random, wanted, tmp_path)
    mlp = {f"{LAYERS}.1.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
    assert set(files) == mlp | {"lm_head.weight"}
    weights = load_file(random.folder / "model.safetensors")
    for name, path in files.items():
        got, weight = calibrate.load(path), weights[name].astype(np.float32)
        assert got.codes.shape == weight.shape
        assert got.scales.shape == got.zeros.shape == (len(weight), weight.shape[1] // 16)
        assert got.codes.max() <= 15
        assert np.linalg.norm(dequantize(got) - weight) < 0.3 * np.linalg.norm(weight)


def test_matrices_of_the_same_input_share_its_hessian(
    random: Checkpoint, hessians: dict[tuple[str, ...], Array], tmp_path: Path
) -> None:
    calibrate.calibrated(random, weight_formats(random), tmp_path)
    text = random.text
    widths = {
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): text.hidden,
        ("self_attn.o_proj",): text.heads * text.head_dim,
        ("mlp.gate_proj", "mlp.up_proj"): text.hidden,
        ("mlp.down_proj",): random.config["text_config"]["intermediate_size"],
    }
    wanted = {
        tuple(f"{LAYERS}.{layer}.{name}.weight" for name in names): (width, width)
        for layer in range(text.layers)
        for names, width in widths.items()
    }
    assert {names: matrix.shape for names, matrix in hessians.items()} == wanted
    assert text.heads * text.head_dim != text.hidden
    for matrix in hessians.values():
        np.testing.assert_allclose(matrix, matrix.T, rtol=1e-4, atol=1e-5)
        assert np.linalg.eigvalsh(matrix.astype(np.float64)).min() > -1e-4 * matrix.diagonal().max()


def walked(checkpoint: Checkpoint, wanted: dict[str, WeightFormat], folder: Path) -> list[list[Array]]:
    """[layer][case]: the residual streams, [seq, H], as calibration hands them on."""
    streams: list[list[Array]] = []
    original: Callable[..., None] = calibrate._layer

    def noted(*arguments: Any) -> None:
        original(*arguments)
        streams.append([stream.hidden[0].numpy().copy() for stream in arguments[3]])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "_layer", noted)
        calibrate.calibrated(checkpoint, wanted, folder)
    return streams


def test_streams_without_quantization_equal_pytorch(random: Checkpoint, tmp_path: Path) -> None:
    """DeepStack levels included: they are added between the layers."""
    reference = Reference(random)
    prompts = list(calibrate.calibration_prompts(reference, random))
    traces = [reference.hidden_states(prompt, answer).decoder for prompt, answer in prompts]
    exact = walked(random, {}, tmp_path / "exact")
    assert len(exact) == random.text.layers
    for layer, streams in enumerate(exact):
        for got, trace in zip(streams, traces, strict=True):
            np.testing.assert_allclose(got, trace[layer][0], atol=1e-4 * float(trace[layer].std()))
    assert any(prompt.pixel_values is not None for prompt, _ in prompts)

    # A layer is calibrated on the outputs of the quantized layers before it.
    lossy = walked(random, weight_formats(random), tmp_path / "lossy")
    errors = [
        max(float(np.abs(a - b).max() / b.std()) for a, b in zip(mine, theirs, strict=True))
        for mine, theirs in zip(lossy, exact, strict=True)
    ]
    assert min(errors) > 1e-2


def test_the_miniatures_calibration_and_held_out_sets_are_disjoint(miniature: Path) -> None:
    checkpoint = open_checkpoint(miniature)
    calibration = cases.read_calibration(checkpoint)
    assert len(calibration) > 8
    assert all(case.answer for case in calibration)
    assert all(path.is_file() and "heldout" not in path.parts for case in calibration for path in case.images)
    mine = {path.read_bytes() for case in calibration for path in case.images}
    assert mine.isdisjoint(path.read_bytes() for path in (miniature.parent / "heldout").glob("*.png"))
