"""From rules to files: graphs whose matrices are quantized are written, and ONNX Runtime runs them from the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from safetensors.numpy import save_file

from builder.checkpoint.load import Checkpoint, open_checkpoint
from builder.checkpoint.safetensors import index_tensors
from builder.checkpoint.tensors import EMBEDDINGS
from builder.graph.binding import BoundGraph
from builder.graph.data_files import fill
from builder.graph.external_data import padded
from builder.quantization.blockwise import dequantize
from builder.quantization.blockwise import quantize as quantize_rows
from builder.quantization.rules import Rule, WeightFormat, resolve
from builder.stages import quantize
from builder.stages.engine.estimate import ITEMS, Stored, data_bytes
from builder.util.errors import PassError, WeightError
from builder.util.files import sha256
from tests.helpers.small_graphs import Array, drawn, transposed_bound

ATTENTION = "model.language_model.layers.0.self_attn."
NORM = "model.language_model.norm.weight"
TENSORS: dict[str, Array] = {
    EMBEDDINGS: drawn(40, 64),
    **{
        f"{ATTENTION}{one}_proj.weight": drawn(rows, 64, seed=rows)
        for one, rows in zip("qkv", (64, 16, 32), strict=True)
    },
    NORM: 1 + drawn(64) / 10,
}
# Initializer → tensor. All but the table and the norm are bound the other way round.
BOUND = {f"a.{letter}.weight": f"{ATTENTION}{letter}_proj.weight" for letter in "qkv"}
BOUND |= {"head": EMBEDDINGS, "norm": NORM, "table": EMBEDDINGS}
LOOKUP = "embeddings (int64[batch, seq] ids) => (float[batch, seq, 64] e) { e = Gather(table, ids) }"
DECODER = """
decoder (float[batch, seq, 64] x)
    => (float[batch, seq, 40] logits, float[batch, seq, 16] k_out, float[batch, seq, 32] v_out)
{
    normed = Mul(x, norm)
    q_out = MatMul(normed, a.q.weight)
    k_out = MatMul(normed, a.k.weight)
    v_out = MatMul(normed, a.v.weight)
    logits = MatMul(q_out, head)
}
"""
EVERYTHING = (Rule(("*layers*",), "int4", 64, search="mse", accuracy=1), Rule((EMBEDDINGS,), "int8", 32, accuracy=1))


@pytest.fixture
def source(tmp_path: Path, miniature: Path) -> Checkpoint:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file(TENSORS, folder / "model.safetensors")
    return replace(open_checkpoint(miniature), folder=folder, tensors=index_tensors(folder, ["model.safetensors"]))


def graph(text: str) -> BoundGraph:
    """`text`, with its inputs bound to the checkpoint."""
    read = {name: tensor for name, tensor in BOUND.items() if name in text}
    weights = {name: TENSORS[tensor] for name, tensor in read.items()}
    bound = transposed_bound(text, weights, *(set(read) - {"norm", "table"}))
    return BoundGraph(bound.model, {n: replace(binding, tensor=read[n]) for n, binding in bound.bindings.items()})


def graphs(folder: Path) -> dict[Path, BoundGraph]:
    return {
        folder / "embeddings.onnx": graph(LOOKUP),
        folder / "model.onnx": graph(DECODER),
    }


def written(folder: Path, source: Checkpoint, storages: Mapping[str, WeightFormat], precision: str = "fp32") -> Any:
    """The data files, by name."""
    stored = {
        path: quantize.stored(path, bound, precision, storages, frozenset()) for path, bound in graphs(folder).items()
    }
    files, _ = fill([stored], source)
    return {path.name: data for path, data in files.items()}


def answers(folder: Path, dtype: type = np.float32) -> dict[str, Array]:
    """All outputs of both graphs, the first fed to the second."""
    ids = np.array([[3, 39, 0, 17]])
    found: dict[str, Array] = {}
    feed: dict[str, Array] = {"ids": ids}
    for name in ("embeddings", "model"):
        session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
        names = [port.name for port in session.get_outputs()]
        found |= dict(zip(names, session.run(None, feed), strict=True))
        feed = {"x": found["e"]}
    assert {array.dtype for array in found.values()} == {np.dtype(dtype)}
    return found


def expected(storages: Mapping[str, WeightFormat]) -> dict[str, Array]:
    """The same in numpy, with dequantized matrices."""
    have = {
        name: dequantize(quantize_rows(array, storages[name].blocks)) if name in storages else array
        for name, array in TENSORS.items()
    }
    e = have[EMBEDDINGS][[[3, 39, 0, 17]]]
    normed = e * have[NORM]
    q, k, v = (normed @ have[f"{ATTENTION}{letter}_proj.weight"].T for letter in "qkv")
    return {"e": e, "logits": q @ have[EMBEDDINGS].T, "k_out": k, "v_out": v}


def assert_near(got: Mapping[str, Array], want: Mapping[str, Array], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert np.abs(got[name].astype(np.float32) - array).max() < tolerance * array.std(), name


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("rules", [EVERYTHING, EVERYTHING[:1], EVERYTHING[1:]], ids=["both", "layers", "head"])
def test_onnxruntime_computes_with_the_dequantized_matrices(
    source: Checkpoint, tmp_path: Path, precision: str, rules: tuple[Rule, ...]
) -> None:
    storages = resolve(rules, source.tensors)
    files = written(tmp_path, source, storages, precision)
    narrow = precision == "fp16"
    got = answers(tmp_path, np.float16 if narrow else np.float32)
    assert_near(got, expected(storages), 0.02 if narrow else 1e-4)
    assert {name: data.sha256 for name, data in files.items()} == {name: sha256(tmp_path / name) for name in files}
    estimated = data_bytes(source.tensors.values(), Stored(storages, precision))
    if EMBEDDINGS in storages:  # one file: the rows that are looked up are those of the head
        assert list(files) == ["model.onnx.data"]
    else:  # here, the head is turned; builder/graph/passes/gemm_head.py keeps it as it is
        estimated += padded(TENSORS[EMBEDDINGS].size * ITEMS[precision])
    assert sum((tmp_path / name).stat().st_size for name in files) == estimated


def test_the_comparison_notices_rounding(source: Checkpoint, tmp_path: Path) -> None:
    """A control: the quantized graph does not compute with unquantized weights."""
    storages = resolve(EVERYTHING, source.tensors)
    written(tmp_path, source, storages)
    with pytest.raises(AssertionError):
        assert_near(answers(tmp_path), expected({}), 1e-2)
    assert_near(answers(tmp_path), expected({}), 1)


def test_the_same_inputs_give_the_same_bytes(source: Checkpoint, tmp_path: Path) -> None:
    storages = resolve(EVERYTHING, source.tensors)
    for name in ("one", "two"):
        written(tmp_path / name, source, storages, "fp16")
    for file in ("embeddings.onnx", "model.onnx", "model.onnx.data"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_weight_that_is_read_in_another_way_is_refused_with_the_rule_that_keeps_it(
    source: Checkpoint, tmp_path: Path
) -> None:
    bound = graph(
        DECODER.replace("MatMul(normed, a.k.weight)", "MatMul(normed, fixed)").replace("{", "{ fixed = Neg(a.k.weight)")
    )
    with pytest.raises(PassError, match=r"a rule selects a weight of model\.onnx") as caught:
        quantize.stored(tmp_path / "model.onnx", bound, "fp32", resolve(EVERYTHING, source.tensors), frozenset())
    assert "reads a.k.weight in a way" in str(caught.value.found)
    assert 'store = "keep"' in str(caught.value.next)


def test_a_selected_matrix_that_is_not_quantized_is_an_error(source: Checkpoint, tmp_path: Path) -> None:
    storages = resolve(EVERYTHING, source.tensors)
    left = {name: storage for name, storage in storages.items() if not name.endswith("k_proj.weight")}
    stored = [quantize.stored(path, graph, "fp32", left, frozenset()) for path, graph in graphs(tmp_path).items()]
    quantize._check_complete(source, "genai", stored, left)
    with pytest.raises(WeightError, match="1 matrices were not quantized for the target genai") as caught:
        quantize._check_complete(source, "genai", stored, storages)
    assert str(caught.value.found).endswith("k_proj.weight")
