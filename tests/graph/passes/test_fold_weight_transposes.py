"""fold_weight_transposes: what is folded, what is left, and that ONNX Runtime computes the same before and after."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from builder.graph.binding import UNBOUND, Binding
from builder.graph.passes.fold_weight_transposes import fold_weight_transposes
from tests.helpers.small_graphs import bound_graph, drawn, operators, run

TWO_LINEARS = """
two (float[seq, 4] x) => (float[seq, 3] y) {
    t1 = Transpose <perm = [1, 0]> (up)
    h = MatMul(x, t1)
    t2 = Transpose <perm = [1, 0]> (down)
    y = MatMul(h, t2)
}
"""
TIED = """
tied (int64[seq] ids) => (float[seq, 6] logits) {
    axes = Constant <value = int64[1] {0}> ()
    embeds = Gather <axis = 0> (table, ids)
    head = Transpose <perm = [1, 0]> (table)
    logits = MatMul(embeds, head)
}
"""


def test_a_linear_layer_reads_its_weight_as_it_will_be_stored() -> None:
    weights = {"up": drawn(5, 4), "down": drawn(3, 5)}
    graph, x = bound_graph(TWO_LINEARS, weights), drawn(7, 4)
    before = run(graph, weights, x=x)
    outcome = fold_weight_transposes(graph)
    assert (outcome.matches, outcome.misses) == (2, ())
    assert operators(outcome.graph) == {"MatMul": 2}
    bindings = outcome.graph.bindings
    assert bindings["up"] == Binding("up", "checkpoint.up", "float32", (5, 4), transposed=True)
    assert [bindings[name].stored_shape for name in ("up", "down")] == [(4, 5), (5, 3)]
    np.testing.assert_allclose(run(outcome.graph, weights, x=x), before, rtol=1e-5, atol=1e-6)


def test_the_initializer_is_still_a_placeholder_of_the_new_shape() -> None:
    outcome = fold_weight_transposes(bound_graph(TWO_LINEARS, {"up": drawn(5, 4), "down": drawn(3, 5)}))
    value = outcome.graph.model.graph.initializers["up"]
    assert value.shape == (4, 5)
    assert isinstance(value.const_value, ir.ExternalTensor)
    assert value.const_value.shape == (4, 5)
    assert value.const_value.location == UNBOUND


def test_a_weight_that_is_read_elsewhere_too_is_left_and_reported() -> None:
    weights, ids = {"table": drawn(6, 4)}, np.array([5, 0, 2])
    graph = bound_graph(TIED, weights)
    before = run(graph, weights, ids=ids)
    outcome = fold_weight_transposes(graph)
    assert outcome.matches == 0
    assert outcome.misses == ("table: not a plain transposition, or also read elsewhere",)
    assert operators(outcome.graph)["Transpose"] == 1
    assert not outcome.graph.bindings["table"].transposed
    np.testing.assert_array_equal(run(outcome.graph, weights, ids=ids), before)


def test_a_weight_of_two_layers_is_left_and_reported_twice() -> None:
    text = """shared (float[seq, 4] x) => (float[seq, 4] y) {
        t1 = Transpose <perm = [1, 0]> (weight)
        h = MatMul(x, t1)
        t2 = Transpose <perm = [1, 0]> (weight)
        y = MatMul(h, t2)
    }"""
    outcome = fold_weight_transposes(bound_graph(text, {"weight": drawn(4, 4)}))
    assert (outcome.matches, len(outcome.misses)) == (0, 2)


@pytest.mark.parametrize("perm", ["0, 2, 1", "2, 1, 0", "1, 0, 2"])
def test_a_transposition_of_three_axes_is_left_and_reported(perm: str) -> None:
    text = f"""three (float[p, n, m] x) => (float[p, n, m] y) {{
        t = Transpose <perm = [{perm}]> (weight)
        y = Mul(x, t)
    }}"""
    weights, x = {"weight": drawn(3, 3, 3)}, drawn(3, 3, 3, seed=1)
    graph = bound_graph(text, weights)
    before = run(graph, weights, x=x)
    outcome = fold_weight_transposes(graph)
    assert (outcome.matches, len(outcome.misses)) == (0, 1)
    assert "weight" in outcome.misses[0]
    np.testing.assert_array_equal(run(outcome.graph, weights, x=x), before)


def test_without_perm_all_axes_are_reversed() -> None:
    text = "three (float[5, 4, 3] x) => (float[5, 4, 3] y) { t = Transpose(weight) y = Mul(x, t) }"
    weights, x = {"weight": drawn(3, 4, 5)}, drawn(5, 4, 3)
    graph = bound_graph(text, weights)
    before = run(graph, weights, x=x)
    outcome = fold_weight_transposes(graph)
    assert outcome.matches == 1
    np.testing.assert_array_equal(run(outcome.graph, weights, x=x), before)


def test_activations_and_constants_are_not_candidates() -> None:
    text = """other (float[3, 4] x) => (float[4, 3] y) {
        constant = Constant <value = float[3, 2] {1, 2, 3, 4, 5, 6}> ()
        turned = Transpose <perm = [1, 0]> (constant)
        product = MatMul(turned, x)
        y = Transpose <perm = [1, 0]> (x)
    }"""
    outcome = fold_weight_transposes(bound_graph(text))
    assert (outcome.matches, outcome.misses) == (0, ())
    assert operators(outcome.graph)["Transpose"] == 2


def test_a_second_run_finds_nothing() -> None:
    first = fold_weight_transposes(bound_graph(TWO_LINEARS, {"up": drawn(5, 4), "down": drawn(3, 5)}))
    assert fold_weight_transposes(first.graph).matches == 0
