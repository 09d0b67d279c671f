"""The fp32 copy of a bundle has the weights that ONNX Runtime computes with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper
from safetensors.numpy import load_file

from builder.bundle.dequantize import RoundingError, write_dequantized
from builder.checkpoint.load import Checkpoint, open_checkpoint
from builder.checkpoint.parts import DECODER, EMBEDDINGS, VISION
from builder.checkpoint.tensors import EMBEDDINGS as EMBEDDING_MATRIX
from builder.checkpoint.tensors import LM_HEAD
from builder.quantization.blockwise import Blocks, dequantize, quantize
from builder.quantization.packing import packed_parts
from builder.util.errors import BundleError
from builder.verify.self_test.edits import edited, weight
from tests.helpers.checkpoints import MINIATURE, write_checkpoint
from tests.helpers.random_models import Array

pytestmark = pytest.mark.torch

LAYER = "model.language_model.layers.{}.{}.weight"


@pytest.fixture(scope="module")
def written(
    finished: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, list[RoundingError]]:
    """Of the miniature in int4."""
    folder = tmp_path_factory.mktemp("dequantized")
    errors = write_dequantized(finished("int4"), open_checkpoint(MINIATURE), "fp32", folder)
    return open_checkpoint(folder), errors


@pytest.fixture(scope="module")
def tensors(written: tuple[Checkpoint, list[RoundingError]]) -> dict[str, Array]:
    found: dict[str, Array] = load_file(written[0].folder / "model.safetensors")
    return found


def originals() -> dict[str, Array]:
    """The miniature's bundles, in fp32."""
    return {name: raw.astype(np.float32) for name, raw in load_file(MINIATURE / "model.safetensors").items()}


def products(folder: Path, name: str) -> Iterator[tuple[str, Array]]:
    """Name of each MatMulNBits' codes, and its product with the identity, transposed: [rows, columns]."""
    model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            columns = next(item.i for item in node.attribute if item.name == "K")
            identity = np.eye(columns, dtype=np.float32)
            yield node.input[1], run(folder, model, node, {node.input[0]: identity}).T


def run(folder: Path, model: onnx.ModelProto, node: NodeProto, feed: dict[str, Array]) -> Array:
    """A single node, with fp32 activations, on the bundle's data file."""
    alone = NodeProto()
    alone.CopyFrom(node)
    del alone.input[4:]  # a bias
    for item in alone.attribute:
        item.i = 1 if item.name == "accuracy_level" else item.i
    types = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
    graph = helper.make_graph(
        [alone],
        "alone",
        [helper.make_tensor_value_info(name, types[value.dtype], value.shape) for name, value in feed.items()],
        [helper.make_tensor_value_info(alone.output[0], TensorProto.FLOAT, None)],
        [tensor for tensor in model.graph.initializer if tensor.name in alone.input],
    )
    made = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, feed)
    return np.asarray(result)


def parts(levels: str) -> list[str]:
    """Checkpoint names of the matrices in a node's codes."""
    stem = levels.removesuffix(".levels")
    if stem in ("lm_head.weight", "embed_tokens.weight"):
        return [EMBEDDING_MATRIX]
    path, _, names = stem.removesuffix(".weight").rpartition(".")
    return [f"model.{path}.{name}.weight" for name in names.split("+")]


@pytest.mark.parametrize("graph", [VISION, DECODER])
def test_matrices_equal_those_that_the_runtime_uses(
    finished: Callable[[str], Path], tensors: dict[str, Array], graph: str
) -> None:
    seen = 0
    for levels, matrix in products(finished("int4"), graph):
        want = np.concatenate([tensors[name] for name in parts(levels)])
        np.testing.assert_allclose(matrix, want, rtol=1e-6, atol=0, err_msg=levels)
        seen += len(parts(levels))
    assert seen > 20


def test_rows_are_what_the_runtime_looks_up(finished: Callable[[str], Path], tensors: dict[str, Array]) -> None:
    model = onnx.load(finished("int4") / f"{EMBEDDINGS}.onnx", load_external_data=False)
    (node,) = [each for each in model.graph.node if each.op_type == "GatherBlockQuantized"]
    want = tensors[EMBEDDING_MATRIX]
    got = run(finished("int4"), model, node, {node.input[1]: np.arange(len(want))})
    np.testing.assert_array_equal(got, want)


def test_it_is_a_checkpoint_with_the_original_unquantized_tensors(
    written: tuple[Checkpoint, list[RoundingError]], tensors: dict[str, Array]
) -> None:
    opened, errors = written
    original = open_checkpoint(MINIATURE)
    assert {name: tensor.shape for name, tensor in opened.tensors.items()} == {
        name: tensor.shape for name, tensor in original.tensors.items()
    }
    assert {tensor.dtype for tensor in opened.tensors.values()} == {"F32"}
    assert opened.config["dtype"] == "float32"
    quantized, want = {error.tensor for error in errors}, originals()
    assert {name for name in want if not np.array_equal(tensors[name], want[name])} == quantized
    assert {name for name in want if want[name].ndim == 1}.isdisjoint(quantized)


def test_errors_are_those_of_the_matrices(
    written: tuple[Checkpoint, list[RoundingError]], tensors: dict[str, Array]
) -> None:
    _, errors = written
    want = originals()
    assert {error.bits for error in errors} > {4.5, 8.5}
    for error in errors:
        got, own = tensors[error.tensor], want[error.tensor]
        rows = np.linalg.norm(got - own, axis=1) / np.linalg.norm(own, axis=1)
        assert error.relative == pytest.approx(np.linalg.norm(got - own) / np.linalg.norm(own), rel=1e-4)
        assert error.worst_row == pytest.approx(rows.max(), rel=1e-4)


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_unquantized_tensors_are_rounded_to_the_precision(
    finished: Callable[[str], Path], checkpoint: Callable[[str], Path], tmp_path: Path, precision: str, dtype: Any
) -> None:
    """A bundle without quantized matrices, and a checkpoint whose values neither type represents."""
    (tmp_path / "none").mkdir()
    untied = checkpoint("untied")
    assert write_dequantized(tmp_path / "none", open_checkpoint(untied), precision, tmp_path / "out") == []
    got = load_file(tmp_path / "out" / "model.safetensors")
    for shard in untied.glob("*.safetensors"):
        for name, raw in load_file(shard).items():
            np.testing.assert_array_equal(got[name], raw.astype(dtype).astype(np.float32))
            assert raw.size < 100 or not np.array_equal(got[name], raw)
    assert len(open_checkpoint(tmp_path / "out").tensors) == len(got)


def test_a_head_of_its_own_is_not_the_embeddings(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    untied = open_checkpoint(checkpoint("untied"))
    blocks = Blocks(4, 32, zero_points=True)
    rows = np.random.default_rng(0).standard_normal(untied.tensors[LM_HEAD].shape, np.float32)
    quantized = quantize(rows, blocks)
    (tmp_path / "bundle").mkdir()
    onnx.save(head(quantized, blocks), tmp_path / "bundle" / "model.onnx")
    (error,) = write_dequantized(tmp_path / "bundle", untied, "fp32", tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert error.tensor == LM_HEAD
    np.testing.assert_array_equal(got[LM_HEAD], dequantize(quantized))
    assert not np.array_equal(got[EMBEDDING_MATRIX], got[LM_HEAD])


def head(quantized: Any, blocks: Blocks) -> onnx.ModelProto:
    """One matmul with the head, its weights in the graph."""
    count, columns = quantized.codes.shape
    packed = packed_parts(quantized, blocks, "float32")
    names = [f"lm_head.weight.{part}" for part in packed]
    attributes = {"K": columns, "N": count, "bits": blocks.bits, "block_size": blocks.size}
    node = helper.make_node("MatMulNBits", ["x", *names], ["y"], domain="com.microsoft", **attributes)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in zip(names, packed.values(), strict=True)]
    return helper.make_model(helper.make_graph([node], "head", [x], [y], tensors))


def test_a_matrix_that_the_checkpoint_does_not_have_is_refused(lossy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = lossy("int4")
    with edited(folder, DECODER) as graph:
        renamed(graph, weight(graph, "layers.2.mlp.down_proj.weight"), "layers.2.mlp.up_and_down.weight.levels")
    with pytest.raises(
        BundleError, match=r"model\.onnx quantizes a matrix that the checkpoint does not have"
    ) as caught:
        write_dequantized(folder, open_checkpoint(MINIATURE), "fp32", tmp_path / "out")
    assert "up_and_down" in str(caught.value.found)


def renamed(graph: ir.Graph, value: ir.Value, name: str) -> None:
    del graph.initializers[str(value.name)]
    value.name = name
    graph.register_initializer(value)


@pytest.mark.parametrize("text", [{"intermediate_size": 64}, {"head_dim": 16}], ids=["columns", "rows"])
def test_a_matrix_of_another_shape_is_refused(
    finished: Callable[[str], Path], tmp_path: Path, text: dict[str, int]
) -> None:
    own = json.loads((MINIATURE / "config.json").read_text())
    same = {key: value for key, value in own["text_config"].items() if isinstance(value, int) and "token" not in key}
    vision = {key: value for key, value in own["vision_config"].items() if isinstance(value, int)}
    other = write_checkpoint(tmp_path / "other", text={**same, **text}, vision=vision)
    with pytest.raises(BundleError, match="has a different shape than the checkpoint's"):
        write_dequantized(finished("int4"), open_checkpoint(other), "fp32", tmp_path / "out")
