"""gemm_head: the head keeps the checkpoint's layout, and ONNX Runtime computes the same before and after."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from builder.checkpoint.tensors import EMBEDDINGS, LM_HEAD
from builder.graph.binding import UNBOUND
from builder.graph.passes.fold_weight_transposes import fold_weight_transposes
from builder.graph.passes.gemm_head import gemm_head
from tests.helpers.small_graphs import bound_graph, bound_to, drawn, operators, run

# hidden 4, vocab 6
DECODER = """
decoder (float[batch, seq, 4] x) => (float[batch, seq, 6] logits, float[batch, seq, 4] present) {
    t1 = Transpose <perm = [1, 0]> (up)
    present = MatMul(x, t1)
    t2 = Transpose <perm = [1, 0]> (head)
    logits = MatMul(present, t2)
}
"""
WEIGHTS = {"up": drawn(4, 4), "head": drawn(6, 4, seed=1)}


@pytest.mark.parametrize("tensor", [LM_HEAD, EMBEDDINGS], ids=["untied", "tied"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 1), (1, 7)], ids=str)
def test_the_logits_are_the_same_and_the_head_is_not_transposed(tensor: str, shape: tuple[int, int]) -> None:
    graph, x = bound_to(bound_graph(DECODER, WEIGHTS), head=tensor), drawn(*shape, 4)
    before = run(graph, WEIGHTS, x=x)
    assert before[0].shape == (*shape, 6)
    outcome = gemm_head(graph)
    assert outcome.matches == 1
    assert operators(outcome.graph) == {"Transpose": 1, "MatMul": 1, "Reshape": 2, "Shape": 1, "Concat": 1, "Gemm": 1}
    assert outcome.graph.bindings == graph.bindings
    assert not outcome.graph.bindings["head"].transposed
    for got, want in zip(run(outcome.graph, WEIGHTS, x=x), before, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_what_folds_other_weights_after_it_leaves_the_head_alone() -> None:
    graph, x = bound_to(bound_graph(DECODER, WEIGHTS), head=LM_HEAD), drawn(2, 5, 4)
    before = run(graph, WEIGHTS, x=x)
    folded = fold_weight_transposes(gemm_head(graph).graph)
    assert (folded.matches, folded.misses) == (1, ())
    assert {name: binding.transposed for name, binding in folded.graph.bindings.items()} == {"up": True, "head": False}
    np.testing.assert_allclose(run(folded.graph, WEIGHTS, x=x)[0], before[0], rtol=1e-5, atol=1e-6)


def test_the_ports_keep_their_names_order_shapes_and_types() -> None:
    graph = bound_to(bound_graph(DECODER, WEIGHTS), head=LM_HEAD)
    before = [(port.name, port.shape, port.type) for port in graph.model.graph.outputs]
    outputs = gemm_head(graph).graph.model.graph.outputs
    assert [(port.name, port.shape, port.type) for port in outputs] == before
    producer = outputs[0].producer()
    assert producer is not None
    assert producer.op_type == "Reshape"


def test_logits_that_are_read_in_the_graph_too() -> None:
    text = DECODER.replace("logits = MatMul(present, t2)", "raw = MatMul(present, t2) logits = Tanh(raw)")
    graph, x = bound_to(bound_graph(text, WEIGHTS), head=LM_HEAD), drawn(2, 5, 4)
    before = run(graph, WEIGHTS, x=x)
    outcome = gemm_head(graph)
    assert outcome.matches == 1
    np.testing.assert_allclose(run(outcome.graph, WEIGHTS, x=x)[0], before[0], rtol=1e-5, atol=1e-6)


def test_a_transposition_that_others_read_stays_for_them() -> None:
    text = """both (float[seq, 4] x) => (float[seq, 6] logits, float[4, 6] y) {
        t = Transpose <perm = [1, 0]> (head)
        logits = MatMul(x, t)
        y = Neg(t)
    }"""
    weights, x = {"head": WEIGHTS["head"]}, drawn(5, 4)
    graph = bound_to(bound_graph(text, weights), head=LM_HEAD)
    before = run(graph, weights, x=x)
    outcome = gemm_head(graph)
    assert outcome.matches == 1
    assert operators(outcome.graph)["Transpose"] == 1
    for got, want in zip(run(outcome.graph, weights, x=x), before, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("nodes", "misses"),
    [
        pytest.param("t = Transpose <perm = [1, 0]> (other) y = MatMul(x, t)", 1, id="another weight"),
        pytest.param("y = MatMul(x, head)", 1, id="not transposed"),
        pytest.param("t = Transpose <perm = [0, 1]> (head) y = MatMul(x, t)", 1, id="axes left as they are"),
        pytest.param("t = Transpose <perm = [1, 0]> (head) n = Neg(t) y = MatMul(x, n)", 1, id="changed on the way"),
        pytest.param("t = Transpose <perm = [1, 0]> (head) y = MatMul(t, x)", 1, id="on the left"),
        pytest.param("y = MatMul(x, x)", 1, id="no weight"),
        pytest.param("y = Add(x, head)", 0, id="no product"),
    ],
)
def test_other_matmuls_are_left_and_each_is_reported(nodes: str, misses: int) -> None:
    weights, x = {"head": drawn(4, 4, seed=1), "other": drawn(4, 4, seed=2)}, drawn(4, 4)
    text = f"left (float[4, 4] x) => (float[4, 4] y) {{ {nodes} }}"
    graph = bound_to(bound_graph(text, {name: weights[name] for name in weights if name in nodes}), head=LM_HEAD)
    before, there = run(graph, weights, x=x), operators(graph)
    outcome = gemm_head(graph)
    assert outcome.matches == 0
    assert len(outcome.misses) == misses
    assert all("no transposed head" in miss for miss in outcome.misses)
    assert operators(outcome.graph) == there
    np.testing.assert_array_equal(run(outcome.graph, weights, x=x), before)


def test_the_miss_names_the_node() -> None:
    outcome = gemm_head(bound_to(bound_graph(DECODER, WEIGHTS), head=LM_HEAD))
    assert outcome.misses == ("node_present: no transposed head",)


def test_the_initializer_is_still_a_placeholder_of_its_shape() -> None:
    outcome = gemm_head(bound_to(bound_graph(DECODER, WEIGHTS), head=LM_HEAD))
    value = outcome.graph.model.graph.initializers["head"]
    assert value.shape == (6, 4)
    assert isinstance(value.const_value, ir.ExternalTensor)
    assert value.const_value.location == UNBOUND


def test_a_second_run_finds_nothing() -> None:
    first = gemm_head(bound_to(bound_graph(DECODER, WEIGHTS), head=LM_HEAD))
    assert gemm_head(first.graph).matches == 0
