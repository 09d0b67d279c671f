"""Matrices with a scale per row, multiplied with int8 activations: in a graph, on the disk, in fp32, and rejected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from safetensors.numpy import load_file, save_file

from builder.bundle.dequantize import write_dequantized
from builder.checkpoint.load import Checkpoint, open_checkpoint
from builder.checkpoint.safetensors import index_tensors
from builder.graph.binding import BoundGraph
from builder.graph.data_files import fill
from builder.graph.passes.quantize_weights import quantize_weights
from builder.quantization.blockwise import Blocks, dequantize
from builder.quantization.blockwise import quantize as quantize_rows
from builder.quantization.rules import Rule, WeightFormat, resolve
from builder.stages import quantize
from builder.targets.recipe_file import load_recipe
from builder.util.errors import PassError, RecipeError
from builder.verify.graphs.fp32_copy import in_fp32
from tests.helpers.small_graphs import Array, bound_graph, drawn, operators, transposed_bound

UP, DOWN = "model.visual.blocks.0.mlp.linear_fc1.weight", "model.visual.blocks.0.mlp.linear_fc2.weight"
TENSORS: dict[str, Array] = {UP: drawn(80, 48), DOWN: drawn(40, 80, seed=1), "bias": drawn(80, seed=2)}
GRAPH = """vision_encoder (float[n, 48] x) => (float[n, 40] y) {
    hidden = Gemm <transB = 1> (x, up, bias)
    y = MatMul(hidden, down)
}"""
NAMES = {"up": UP, "down": DOWN, "bias": "bias"}
X = drawn(50, 48, seed=3)


@pytest.fixture
def source(tmp_path: Path, miniature: Path) -> Checkpoint:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file(TENSORS, folder / "model.safetensors")
    return replace(open_checkpoint(miniature), folder=folder, tensors=index_tensors(folder, ["model.safetensors"]))


def graph() -> BoundGraph:
    bound = transposed_bound(GRAPH, {name: TENSORS[tensor] for name, tensor in NAMES.items()}, "down")
    return BoundGraph(bound.model, {n: replace(binding, tensor=NAMES[n]) for n, binding in bound.bindings.items()})


def weight_formats(source: Checkpoint) -> dict[str, WeightFormat]:
    return resolve([Rule(("model.visual.*",), "int8", activations="int8")], source.tensors)


@pytest.fixture
def written(tmp_path: Path, source: Checkpoint) -> Path:
    path = tmp_path / "out" / "vision_encoder.onnx"
    fill([{path: quantize.stored(path, graph(), "fp32", weight_formats(source))}], source)
    return path


def computed(model: str | bytes, folder: Path) -> Array:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": X})[0])


def rounded(name: str) -> Array:
    """The matrix dequantized from its codes, with a scale per row."""
    return dequantize(quantize_rows(TENSORS[name], Blocks(8, TENSORS[name].shape[1], search="mse")))


def by_hand(up: Array, down: Array) -> Array:
    return np.asarray((X @ up.T + TENSORS["bias"]) @ down.T)


def test_a_row_has_a_single_scale_and_is_stored_transposed(source: Checkpoint) -> None:
    assert weight_formats(source) == {
        UP: WeightFormat(Blocks(8, 48, search="mse"), 4, transposed=True),
        DOWN: WeightFormat(Blocks(8, 80, search="mse"), 4, transposed=True),
    }
    outcome = quantize_weights(graph(), weight_formats(source))
    assert (outcome.matches, outcome.misses) == (2, ())
    assert operators(outcome.graph) == {"com.microsoft::DynamicQuantizeMatMul": 2}
    levels, scales = (outcome.graph.bindings[f"up.{part}"] for part in ("levels", "scales"))
    assert (levels.stored_shape, levels.dtype) == ((48, 80), "uint8")
    assert (scales.stored_shape, scales.dtype) == ((80,), "float32")
    assert levels.source == scales.source


def test_what_is_on_the_disk_is_multiplied_with_activations_of_8_bits(written: Path) -> None:
    got, want = computed(str(written), written.parent), by_hand(rounded(UP), rounded(DOWN))
    error = np.abs(got - want).std() / want.std()
    assert 1e-4 < error < 0.02  # the range of a tensor of normal numbers has 256 levels, twice
    data = np.fromfile(written.with_suffix(".onnx.data"), np.uint8)
    levels = quantize_rows(TENSORS[UP], Blocks(8, 48, search="mse")).codes
    place = {entry.key: entry.value for entry in external(written, "up.levels").external_data}
    begin = int(place["offset"])
    assert (data[begin : begin + levels.size].reshape(48, 80) == levels.T).all()


def external(path: Path, name: str) -> onnx.TensorProto:
    model: onnx.ModelProto = onnx.load(path, load_external_data=False)
    found: onnx.TensorProto = next(tensor for tensor in model.graph.initializer if tensor.name.endswith(name))
    return found


def test_a_fp32_copy_computes_in_fp32_on_the_same_bytes(written: Path) -> None:
    fp32_copy = in_fp32(onnx.load(written, load_external_data=False))
    got = computed(fp32_copy.SerializeToString(), written.parent)
    np.testing.assert_allclose(got, by_hand(rounded(UP), rounded(DOWN)), rtol=1e-4, atol=1e-4)
    assert (
        external(written, "up.levels").external_data
        == next(tensor for tensor in fp32_copy.graph.initializer if tensor.name.endswith("up.levels")).external_data
    )


@pytest.mark.parametrize("wrong", [127, 129])
def test_a_fp32_copy_shows_a_zero_point_that_is_off_by_one(written: Path, wrong: int) -> None:
    model = onnx.load(written, load_external_data=False)
    zeros = [node for node in model.graph.node if node.op_type == "Constant"]
    for node in zeros:
        node.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(np.array(wrong, np.uint8)))
    got, want = computed(in_fp32(model).SerializeToString(), written.parent), by_hand(rounded(UP), rounded(DOWN))
    assert np.abs(got - want).max() > 0.01 * want.std()


def test_the_checkpoint_of_a_bundle_has_the_dequantized_matrices(
    written: Path, source: Checkpoint, tmp_path: Path
) -> None:
    for name in ("up", "down"):  # as a build names them
        _rename(written, name, NAMES[name].removeprefix("model."))
    errors = write_dequantized(written.parent, source, "fp32", tmp_path / "again")
    found = load_file(tmp_path / "again" / "model.safetensors")
    for name in (UP, DOWN):
        np.testing.assert_array_equal(found[name], rounded(name))
    assert {error.tensor: error.bits for error in errors} == {UP: 8 + 32 / 48, DOWN: 8 + 32 / 80}
    assert all(0 < error.relative < 0.01 for error in errors)


def _rename(path: Path, name: str, new: str) -> None:
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace(f"{name}.", f"{new}.") if tensor.name.startswith(f"{name}.") else tensor.name
    for node in model.graph.node:
        for at, value in enumerate(node.input):
            node.input[at] = value.replace(f"{name}.", f"{new}.") if value.startswith(f"{name}.") else value
    onnx.save(model, path)


def test_a_lookup_table_cannot_be_transposed() -> None:
    text = "embeddings (int64[batch, seq] ids) => (float[batch, seq, 48] e) { e = Gather(table, ids) }"
    bound = bound_graph(text, {"table": TENSORS[UP]})
    weight_format = {"checkpoint.table": WeightFormat(Blocks(8, 48), 4, transposed=True)}
    with pytest.raises(PassError) as caught:
        quantize.stored(Path("embeddings.onnx"), bound, "fp32", weight_format)
    assert "reads table in a way" in str(caught.value.found)


def test_a_column_that_is_far_off_costs_its_own_row_alone() -> None:
    values = drawn(4, 64)
    values[2] *= 1000
    error = dequantize(quantize_rows(values, Blocks(8, 64, search="mse"))) - values
    relative = np.linalg.norm(error, axis=1) / np.linalg.norm(values, axis=1)
    assert (relative < 0.01).all()


HEAD = 'precision = "fp32"\ntargets = ["genai"]\n'
RULE = '[[rules]]\nweights = ["model.visual.*"]\nstore = "int8"\nactivations = "int8"\n'
LIMITS = (
    "[limits]\nweight = 0.2\nkl_mean = 0.1\nkl_p99 = 1.0\nsame_top = 0.9\nperplexity = 1.2\ntask_lost = 1\nlead = 2.0\n"
)


def test_a_recipe_requests_it_in_a_rule(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(HEAD + RULE + LIMITS)
    assert load_recipe(path).rules == (Rule(("model.visual.*",), "int8", activations="int8"),)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (HEAD + RULE.replace('store = "int8"', 'store = "int4"'), "store = 'int4'"),
        (HEAD + RULE + "zero_points = true\n", "zero_points = True"),
        (HEAD + RULE + 'search = "gptq"\n', "search = 'gptq'"),
        (HEAD + 'provider = "cuda"\n' + RULE, "8-bit activations for model.visual.*"),
        (HEAD.replace("fp32", "fp16") + RULE, "8-bit activations for model.visual.*"),
    ],
)
def test_formats_without_a_kernel_are_rejected(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text + LIMITS)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert reason in str(caught.value.found)
    assert "remove `activations`" in str(caught.value.next)


@pytest.mark.torch
def test_the_vision_encoder_of_the_fast_recipe_multiplies_integers(finished: Callable[[str], Path]) -> None:
    model = ir.load(finished("int4-fast") / "vision_encoder.onnx")
    found = [node.op_type for node in model.graph if node.op_type in ("DynamicQuantizeMatMul", "MatMulNBits", "MatMul")]
    assert set(found) == {"DynamicQuantizeMatMul"}
