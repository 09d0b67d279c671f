"""fuse_rms_norm: which norms become SimplifiedLayerNormalization, and that they compute the same."""

from __future__ import annotations

import numpy as np
import pytest

from builder.graph.passes.fuse_rms_norm import fuse_rms_norm
from tests.helpers.small_graphs import Array, bound_graph, drawn, operators, run

WEIGHTS = {"weight": 1 + 0.1 * drawn(8)}
X = 3 * drawn(2, 5, 8)
LEFT = "a ReduceMean is left that is not an RMS norm over the last axis"


def norm(
    exponent: str = "2", axes: str = "1] {-1", epsilon: str = "1e-6", weight: str = "weight", name: str = "x"
) -> str:
    """The nodes of a norm, as upstream's module is traced: `name` → `name`_normed."""
    return f"""
        {name}_two = Constant <value = float {{{exponent}}}> ()
        {name}_axes = Constant <value = int64[{axes}}}> ()
        {name}_eps = Constant <value = float {{{epsilon}}}> ()
        {name}_squares = Pow({name}, {name}_two)
        {name}_mean = ReduceMean <keepdims = 1, noop_with_empty_axes = 0> ({name}_squares, {name}_axes)
        {name}_variance = Add({name}_mean, {name}_eps)
        {name}_root = Sqrt({name}_variance)
        {name}_inverse = Reciprocal({name}_root)
        {name}_scaled = Mul({name}, {name}_inverse)
        {name}_normed = Mul({weight}, {name}_scaled)"""


def text_of(nodes: str, output: str = "x_normed") -> str:
    """A graph of these nodes, [batch, seq, 8] in and out."""
    return f"one (float[batch, seq, 8] x) => (float[batch, seq, 8] y) {{ {nodes} y = Neg({output}) }}"


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    """Zhang and Sennrich 2019, in float64."""
    x64 = x.astype(np.float64)
    return np.asarray(weight * x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + epsilon))


@pytest.mark.parametrize("epsilon", ["1e-6", "1e-5", "0.75"])
def test_a_norm_is_one_operator_with_its_epsilon(epsilon: str) -> None:
    graph = bound_graph(text_of(norm(epsilon=epsilon)), WEIGHTS)
    (before,) = run(graph, WEIGHTS, x=X)
    outcome = fuse_rms_norm(graph)
    assert (outcome.matches, outcome.misses) == (1, ())
    assert operators(outcome.graph) == {"SimplifiedLayerNormalization": 1, "Neg": 1}
    fused = next(node for node in outcome.graph.model.graph if node.op_type == "SimplifiedLayerNormalization")
    assert fused.attributes.get_float("epsilon") == np.float32(epsilon)
    assert fused.attributes.get_int("axis") == -1
    (after,) = run(outcome.graph, WEIGHTS, x=X)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(-after, rms_norm(X, WEIGHTS["weight"], float(epsilon)), rtol=1e-5, atol=1e-6)


def test_inputs_near_zero_go_through_the_epsilon() -> None:
    graph, small = bound_graph(text_of(norm(epsilon="1e-5")), WEIGHTS), X * np.float32(1e-4)
    (before,) = run(graph, WEIGHTS, x=small)
    (after,) = run(fuse_rms_norm(graph).graph, WEIGHTS, x=small)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-8)


def test_each_norm_of_a_chain_keeps_its_own_weight_and_epsilon() -> None:
    weights = {**WEIGHTS, "other": 2 + drawn(8, seed=1)}
    nodes = norm(epsilon="0.5") + norm(epsilon="1e-6", weight="other", name="x_normed")
    graph = bound_graph(text_of(nodes, "x_normed_normed"), weights)
    (before,) = run(graph, weights, x=X)
    outcome = fuse_rms_norm(graph)
    assert (outcome.matches, outcome.misses) == (2, ())
    (after,) = run(outcome.graph, weights, x=X)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
    twice = rms_norm(rms_norm(X, weights["weight"], 0.5), weights["other"], 1e-6)
    np.testing.assert_allclose(-after, twice, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "nodes",
    [
        pytest.param(norm(axes="1] {1"), id="another axis"),
        pytest.param(norm(axes="2] {1, -1"), id="two axes"),
        pytest.param(norm(exponent="3"), id="exponent 3"),
        pytest.param(norm(exponent="-2"), id="exponent -2"),
    ],
)
def test_other_norms_are_left_and_reported(nodes: str) -> None:
    graph, x = bound_graph(text_of(nodes), WEIGHTS), np.abs(X)
    before = run(graph, WEIGHTS, x=x)
    outcome = fuse_rms_norm(graph)
    assert (outcome.matches, outcome.misses) == (0, (LEFT,))
    assert "SimplifiedLayerNormalization" not in operators(outcome.graph)
    np.testing.assert_array_equal(run(outcome.graph, WEIGHTS, x=x), before)


def test_a_norm_whose_parts_are_read_by_others_is_left_and_reported() -> None:
    graph = bound_graph(text_of(norm() + " both = Add(x_normed, x_root)", "both"), WEIGHTS)
    before = run(graph, WEIGHTS, x=X)
    outcome = fuse_rms_norm(graph)
    assert (outcome.matches, outcome.misses) == (0, (LEFT,))
    np.testing.assert_array_equal(run(outcome.graph, WEIGHTS, x=X), before)


def test_a_miss_next_to_a_match_is_reported_too() -> None:
    nodes = norm() + norm(axes="1] {1", weight="other", name="x_normed")
    weights = {**WEIGHTS, "other": 2 + drawn(8, seed=1)}
    graph = bound_graph(text_of(nodes, "x_normed_normed"), weights)
    before = run(graph, weights, x=X)
    outcome = fuse_rms_norm(graph)
    assert (outcome.matches, outcome.misses) == (1, (LEFT,))
    np.testing.assert_allclose(run(outcome.graph, weights, x=X), before, rtol=1e-5, atol=1e-6)


def test_an_epsilon_or_exponent_that_is_an_input_is_left() -> None:
    text = text_of(norm()).replace("(float[batch, seq, 8] x)", "(float[batch, seq, 8] x, float eps)")
    graph = bound_graph(text.replace("Add(x_mean, x_eps)", "Add(x_mean, eps)"), WEIGHTS)
    outcome = fuse_rms_norm(graph)
    assert (outcome.matches, outcome.misses) == (0, (LEFT,))
