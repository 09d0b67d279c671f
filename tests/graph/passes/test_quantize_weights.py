"""quantize_weights: matmuls and lookups on quantized matrices, against the same graph on dequantized matrices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from builder.graph.binding import UNBOUND, Binding, BoundGraph, load, save
from builder.graph.passes.quantize_weights import quantize_weights
from builder.quantization.blockwise import Blocks, dequantize, quantize
from builder.quantization.packing import packed_parts
from builder.quantization.rules import WeightFormat
from tests.helpers.small_graphs import Array, Weights, bound_graph, drawn, operators, run, transposed_bound

INT4, INT8 = WeightFormat(Blocks(4, 16, search="mse"), 1), WeightFormat(Blocks(8, 32), 1)
ZERO = WeightFormat(Blocks(4, 32, zero_points=True), 1)
# q, k and v as the exporter and fold_weight_transposes leave them: [in, out]
ATTENTION = """
attention (float[batch, seq, 64] x) => (float[batch, seq, 24] q, float[batch, seq, 8] k, float[batch, seq, 40] v) {
    q = MatMul(x, a.q_proj.weight)
    k = MatMul(x, a.k_proj.weight)
    v = MatMul(x, a.v_proj.weight)
}
"""
QKV = {"a.q_proj.weight": (24, 64), "a.k_proj.weight": (8, 64), "a.v_proj.weight": (40, 64)}


def matrices(shapes: Mapping[str, tuple[int, int]] = QKV) -> dict[str, Array]:
    """[out, in] each, as a checkpoint has them."""
    return {name: drawn(*shape, seed=number) for number, (name, shape) in enumerate(shapes.items())}


def attention(weights: Weights) -> BoundGraph:
    return transposed_bound(ATTENTION, weights, *weights)


def everything(weight_format: WeightFormat, weights: Iterable[str]) -> dict[str, WeightFormat]:
    return {f"checkpoint.{name}": weight_format for name in weights}


def filled(graph: BoundGraph, weights: Weights) -> BoundGraph:
    """The quantized graph with parts from complete matrices; matrices that were not quantized stay bound."""
    model = ir.from_proto(ir.to_proto(graph.model))
    checkpoint = {f"checkpoint.{name}": array for name, array in weights.items()}
    for name, binding in graph.bindings.items():
        if binding.blocks is not None and binding.part is not None:
            rows = np.concatenate([checkpoint[tensor].reshape(-1, binding.shape[1]) for tensor in binding.tensors])
            part = packed_parts(quantize(rows, binding.blocks), binding.blocks, binding.dtype)[binding.part]
            model.graph.initializers[name].const_value = ir.tensor(part.reshape(binding.stored_shape), name=name)
    return BoundGraph(model, {name: binding for name, binding in graph.bindings.items() if binding.blocks is None})


def rounded(weights: Weights, weight_formats: Mapping[str, WeightFormat]) -> dict[str, Array]:
    """Each matrix, dequantized from its codes."""
    found = {}
    for name, array in weights.items():
        weight_format = weight_formats.get(f"checkpoint.{name}")
        found[name] = array if weight_format is None else dequantize(quantize(array, weight_format.blocks))
    return found


def assert_equal(
    graph: BoundGraph, before: BoundGraph, weights: Weights, weight_formats: Mapping[str, WeightFormat]
) -> None:
    x = drawn(2, 3, 64, seed=8)
    want = run(before, rounded(weights, weight_formats), x=x)
    for got, wanted in zip(run(filled(graph, weights), weights, x=x), want, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight_format", [INT4, INT8, ZERO], ids=["int4", "int8", "zero points"])
def test_matmuls_of_the_same_input_and_format_are_merged(weight_format: WeightFormat) -> None:
    weights = matrices()
    weight_formats = everything(weight_format, weights)
    outcome = quantize_weights(attention(weights), weight_formats)
    assert (outcome.matches, outcome.misses) == (3, ())
    assert operators(outcome.graph) == {"com.microsoft::MatMulNBits": 1, "Split": 1}
    assert_equal(outcome.graph, attention(weights), weights, weight_formats)


def test_parts_are_named_after_their_matrices() -> None:
    weights = matrices()
    graph = quantize_weights(attention(weights), everything(ZERO, weights), "float16").graph
    together = "a.q_proj+k_proj+v_proj.weight"
    assert list(graph.bindings) == [f"{together}.{part}" for part in ("levels", "scales", "zero_points")]
    assert list(graph.model.graph.initializers) == list(graph.bindings)
    levels, scales, zeros = graph.bindings.values()
    assert levels.tensors == tuple(f"checkpoint.{name}" for name in weights)
    assert levels.shape == (72, 64)
    assert (levels.stored_shape, scales.stored_shape, zeros.stored_shape) == ((72, 2, 16), (72, 2), (72, 1))
    assert [binding.dtype for binding in graph.bindings.values()] == ["uint8", "float16", "uint8"]
    assert levels.source == scales.source == zeros.source
    for name, binding in graph.bindings.items():
        value = graph.model.graph.initializers[name]
        assert value.shape == binding.stored_shape
        assert isinstance(value.const_value, ir.ExternalTensor)
        assert value.const_value.location == UNBOUND


def test_different_formats_stay_separate() -> None:
    weights = matrices()
    weight_formats = everything(INT4, weights) | {"checkpoint.a.v_proj.weight": INT8}
    outcome = quantize_weights(attention(weights), weight_formats)
    assert outcome.matches == 3
    assert operators(outcome.graph) == {"com.microsoft::MatMulNBits": 2, "Split": 1}
    assert {name.rpartition(".")[0] for name in outcome.graph.bindings} == {
        "a.q_proj+k_proj.weight",
        "a.v_proj.weight",
    }
    assert_equal(outcome.graph, attention(weights), weights, weight_formats)


@pytest.mark.parametrize("kept", list(QKV))
def test_what_no_rule_names_is_left(kept: str) -> None:
    weights = matrices()
    weight_formats = {name: each for name, each in everything(INT4, weights).items() if not name.endswith(kept)}
    outcome = quantize_weights(attention(weights), weight_formats)
    assert outcome.matches == 2
    assert outcome.graph.bindings[kept] == attention(weights).bindings[kept]
    assert operators(outcome.graph)["MatMul"] == 1
    assert_equal(outcome.graph, attention(weights), weights, weight_formats)


def test_different_inputs_stay_separate() -> None:
    text = ATTENTION.replace("v = MatMul(x,", "y = Neg(x) v = MatMul(y,")
    weights = matrices()
    before = transposed_bound(text, weights, *weights)
    outcome = quantize_weights(transposed_bound(text, weights, *weights), everything(INT4, weights))
    assert operators(outcome.graph) == {"com.microsoft::MatMulNBits": 2, "Split": 1, "Neg": 1}
    assert_equal(outcome.graph, before, weights, everything(INT4, weights))


def test_a_matmul_of_a_matmul() -> None:
    text = ATTENTION.replace("v = MatMul(x,", "v = MatMul(q,").replace("24] q", "64] q")
    weights = matrices({**QKV, "a.q_proj.weight": (64, 64)})
    weight_formats = everything(INT4, weights)
    outcome = quantize_weights(transposed_bound(text, weights, *weights), weight_formats)
    assert operators(outcome.graph) == {"com.microsoft::MatMulNBits": 2, "Split": 1}
    assert_equal(outcome.graph, transposed_bound(text, weights, *weights), weights, weight_formats)
    # By identity, not by a name that it shares with the value it replaced: names change later
    # (builder/stages/optimize.py).
    (split,) = [node for node in outcome.graph.model.graph if node.op_type == "Split"]
    assert [node.op_type for node in split.outputs[0].consumers()] == ["MatMulNBits"]


def test_the_operator_has_size_format_and_accuracy() -> None:
    weights = matrices()
    graph = quantize_weights(attention(weights), everything(replace(INT8, accuracy=4), weights)).graph
    (node,) = [node for node in graph.model.graph if node.op_type == "MatMulNBits"]
    attributes = {name: attribute.as_int() for name, attribute in node.attributes.items()}
    assert attributes == {"K": 64, "N": 72, "bits": 8, "block_size": 32, "accuracy_level": 4}


GEMM = """
linear (float[rows, 64] x) => (float[rows, 24] y, float[rows, 24] z) {
    y = Gemm <transB = 1> (x, a.q_proj.weight, bias)
    z = Gemm <transB = 1> (x, a.k_proj.weight)
}
"""


@pytest.mark.parametrize("weight_format", [INT4, ZERO], ids=["int4", "zero points"])
def test_a_bias_is_added_by_the_operator(weight_format: WeightFormat) -> None:
    weights = matrices({"a.q_proj.weight": (24, 64), "a.k_proj.weight": (24, 64)}) | {"bias": drawn(24)}
    weight_formats = everything(weight_format, [*weights][:2])
    outcome = quantize_weights(transposed_bound(GEMM, weights), weight_formats)
    assert outcome.matches == 2
    assert operators(outcome.graph) == {"com.microsoft::MatMulNBits": 2}
    assert "bias" in outcome.graph.bindings
    x = drawn(5, 64, seed=8)
    want = run(transposed_bound(GEMM, weights), rounded(weights, weight_formats), x=x)
    for got, wanted in zip(run(filled(outcome.graph, weights), weights, x=x), want, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


TIED = """
tied (int64[batch, seq] ids) => (float[batch, seq, 64] e, float[batch, seq, 24] logits) {
    e = Gather(table, ids)
    turned = MatMul(e, head)
    logits = Neg(turned)
}
"""


@pytest.mark.parametrize("weight_format", [INT4, ZERO], ids=["int4", "zero points"])
def test_rows_are_looked_up_and_share_their_bytes_with_the_head(weight_format: WeightFormat) -> None:
    table = drawn(24, 64)
    graph = bound_graph(TIED, {"table": table, "head": table.T})
    head = Binding("head", "checkpoint.table", "float32", (24, 64), transposed=True)
    before = BoundGraph(graph.model, {**graph.bindings, "head": head})
    weight_formats = {"checkpoint.table": weight_format}
    ids = np.array([[3, 23, 0]])
    weights = {"table": table, "head": table}
    want = run(before, rounded(weights, weight_formats | {"checkpoint.head": weight_format}), ids=ids)
    outcome = quantize_weights(before, weight_formats)
    assert (outcome.matches, outcome.misses) == (2, ())
    counts = {"com.microsoft::GatherBlockQuantized": 1, "com.microsoft::MatMulNBits": 1, "Neg": 1}
    assert operators(outcome.graph) == counts
    bindings = outcome.graph.bindings
    assert bindings["table.levels"].view == (24, 32)
    assert bindings["table.levels"].content == bindings["head.levels"].content
    for got, wanted in zip(run(filled(outcome.graph, weights), ids=ids), want, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("nodes", "misses"),
    [
        pytest.param("y = Add(x, w)", 1, id="no product"),
        pytest.param("y = MatMul(w, x)", 1, id="on the left"),
        pytest.param("y = MatMul(x, w)", 1, id="rows of the checkpoint as columns"),
        pytest.param("y = Gemm(x, w)", 1, id="a Gemm that does not turn"),
        pytest.param("y = Gemm <transB = 1, alpha = 2.0> (x, w)", 1, id="a Gemm that scales"),
        pytest.param("i = Constant <value = int64 {0}> () r = Gather(x, i) y = Mul(r, w)", 1, id="a factor"),
        pytest.param("t = Transpose <perm = [1, 0]> (w) y = MatMul(x, t)", 1, id="turned by a node"),
        pytest.param("y = Neg(x)", 0, id="not read"),
    ],
)
def test_another_way_of_reading_is_a_miss_and_left(nodes: str, misses: int) -> None:
    text = f"other (float[64, 64] x) => (float[64, 64] y) {{ {nodes} }}"
    graph = bound_graph(text, {"w": drawn(64, 64)})
    there = operators(graph)
    outcome = quantize_weights(graph, {"checkpoint.w": INT4})
    assert outcome.matches == 0
    assert len(outcome.misses) == misses
    assert all("reads w in a way" in miss for miss in outcome.misses)
    assert operators(outcome.graph) == there
    assert ("w" in outcome.graph.bindings) is bool(misses)


def test_a_matrix_that_is_read_both_ways_stays_for_the_other() -> None:
    text = "both (float[64, 64] x) => (float[64, 64] y, float[64, 64] z) { y = MatMul(x, w) z = Add(x, w) }"
    weights = {"w": drawn(64, 64)}
    outcome = quantize_weights(transposed_bound(text, weights, "w"), {"checkpoint.w": INT4})
    assert (outcome.matches, len(outcome.misses)) == (1, 1)
    assert outcome.graph.bindings.keys() == {"w", "w.levels", "w.scales"}


def test_two_matmuls_with_the_same_matrix_share_its_parts() -> None:
    text = """twice (float[s, 64] x) => (float[s, 64] y, float[s, 64] z) {
        y = MatMul(x, w) n = Neg(x) z = MatMul(n, w)
    }"""
    weights = {"w": drawn(64, 64)}
    before, weight_formats = transposed_bound(text, weights, "w"), {"checkpoint.w": INT4}
    outcome = quantize_weights(transposed_bound(text, weights, "w"), weight_formats)
    assert outcome.matches == 2
    assert operators(outcome.graph) == {"com.microsoft::MatMulNBits": 2, "Neg": 1}
    assert outcome.graph.bindings.keys() == {"w.levels", "w.scales"}
    assert_equal_rows(outcome.graph, before, weights, weight_formats)


def assert_equal_rows(
    graph: BoundGraph, before: BoundGraph, weights: Weights, weight_formats: Mapping[str, WeightFormat]
) -> None:
    x = drawn(5, 64, seed=8)
    want = run(before, rounded(weights, weight_formats), x=x)
    for got, wanted in zip(run(filled(graph, weights), weights, x=x), want, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_the_comparison_notices_members_in_another_order() -> None:
    """A control: with k's rows before q's."""
    weights = matrices()
    weight_formats = everything(INT4, weights)
    graph = quantize_weights(attention(weights), weight_formats).graph
    first = next(iter(graph.bindings.values())).tensors
    mixed = (first[1], first[0], *first[2:])
    bindings = {name: replace(binding, tensor=mixed[0], below=mixed[1:]) for name, binding in graph.bindings.items()}
    with pytest.raises(AssertionError):
        assert_equal(BoundGraph(graph.model, bindings), attention(weights), weights, weight_formats)


def test_ports_keep_their_names_shapes_and_types_and_the_pair_survives_the_disk(tmp_path: Path) -> None:
    weights = matrices()
    before = [(port.name, port.shape, port.type) for port in attention(weights).model.graph.outputs]
    graph = quantize_weights(attention(weights), everything(ZERO, weights)).graph
    assert [(port.name, port.shape, port.type) for port in graph.model.graph.outputs] == before
    assert quantize_weights(graph, everything(ZERO, weights)).matches == 0
    save(graph, tmp_path / "model.onnx")
    assert dict(load(tmp_path / "model.onnx").bindings) == dict(graph.bindings)
