"""fuse_skip_rms_norm: a residual sum and the norm after it become a single operator; the sum stays readable."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from builder.graph.passes.fuse_skip_rms_norm import fuse_skip_rms_norm
from tests.helpers.small_graphs import bound_graph, drawn, operators, run

SKIP = "com.microsoft::SkipSimplifiedLayerNormalization"
NORM = "SimplifiedLayerNormalization"
WEIGHTS = {"weight": 1 + 0.1 * drawn(8), "second": 1 + 0.2 * drawn(8, seed=1)}
X, Y = 2 * drawn(2, 5, 8), drawn(2, 5, 8, seed=1)
PORTS = "(float[batch, seq, 8] x, float[batch, seq, 8] y) => (float[batch, seq, 8] out)"


def normed(value: str, weight: str = "weight", epsilon: str = "1e-5") -> str:
    return f"{NORM} <axis = -1, epsilon = {epsilon}, stash_type = 1> ({value}, {weight})"


@pytest.mark.parametrize("epsilon", ["1e-6", "0.5"])
def test_sum_and_norm_are_one_operator(epsilon: str) -> None:
    graph = bound_graph(
        f"pair {PORTS} {{ sum = Add(x, y) n = {normed('sum', epsilon=epsilon)} out = Neg(n) }}", WEIGHTS
    )
    before = run(graph, WEIGHTS, x=X, y=Y)
    outcome = fuse_skip_rms_norm(graph)
    assert (outcome.matches, outcome.misses) == (1, ())
    assert operators(outcome.graph) == {SKIP: 1, "Neg": 1}
    after = run(outcome.graph, WEIGHTS, x=X, y=Y)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
    total = (X + Y).astype(np.float64)
    want = -WEIGHTS["weight"] * total / np.sqrt((total**2).mean(-1, keepdims=True) + float(epsilon))
    np.testing.assert_allclose(after[0], want, rtol=1e-5, atol=1e-6)


def test_the_sum_stays_readable_for_others() -> None:
    """Two residual steps as in a decoder layer: the second adds to the first's sum, not to its norm."""
    graph = bound_graph(
        f"""steps {PORTS} <float[batch, seq, 8] h> {{
            sum = Add(x, y)
            n = {normed("sum")}
            h = Tanh(n)
            more = Add(sum, h)
            m = {normed("more", "second")}
            wide = Concat <axis = 0> (more, m, sum)
            out = Neg(wide)
        }}""",
        WEIGHTS,
    )
    before = run(graph, WEIGHTS, x=X, y=Y)
    outcome = fuse_skip_rms_norm(graph)
    assert (outcome.matches, outcome.misses) == (2, ())
    assert operators(outcome.graph) == {SKIP: 2, "Tanh": 1, "Concat": 1, "Neg": 1}
    np.testing.assert_allclose(run(outcome.graph, WEIGHTS, x=X, y=Y), before, rtol=1e-5, atol=1e-6)


def test_a_sum_with_two_norms_is_fused_with_the_first() -> None:
    graph = bound_graph(
        f"""two {PORTS} {{
            sum = Add(x, y)
            n = {normed("sum")}
            m = {normed("sum", "second")}
            out = Sub(n, m)
        }}""",
        WEIGHTS,
    )
    before = run(graph, WEIGHTS, x=X, y=Y)
    outcome = fuse_skip_rms_norm(graph)
    assert operators(outcome.graph) == {SKIP: 1, NORM: 1, "Sub": 1}
    assert (outcome.matches, len(outcome.misses)) == (1, 1)
    np.testing.assert_allclose(run(outcome.graph, WEIGHTS, x=X, y=Y), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param("batch, 1, 8", id="one row for all"),
        pytest.param("1, seq, 8", id="one batch for all"),
        pytest.param("seq, 8", id="fewer axes"),
        pytest.param("8", id="a bias"),
        pytest.param("other, seq, 8", id="another axis name"),
    ],
)
def test_a_sum_that_may_broadcast_is_left_and_reported(shape: str) -> None:
    ports = PORTS.replace("float[batch, seq, 8] y", f"float[{shape}] y")
    graph = bound_graph(f"sum {ports} {{ sum = Add(x, y) n = {normed('sum')} out = Neg(n) }}", WEIGHTS)
    sizes = {"batch": 2, "seq": 5, "8": 8, "1": 1, "other": 1}
    y = drawn(*(sizes[dim] for dim in shape.split(", ")))
    before = run(graph, WEIGHTS, x=X, y=y)
    outcome = fuse_skip_rms_norm(graph)
    assert (outcome.matches, len(outcome.misses)) == (0, 1)
    assert "broadcasts" in outcome.misses[0]
    assert operators(outcome.graph) == {"Add": 1, NORM: 1, "Neg": 1}
    np.testing.assert_array_equal(run(outcome.graph, WEIGHTS, x=X, y=y), before)


def test_axes_without_a_name_may_broadcast_and_are_left() -> None:
    """Two unknown axes compare equal; the operator would read past the end of the shorter axis."""
    ports = PORTS.replace("batch, seq", "?, ?")
    graph = bound_graph(f"sum {ports} {{ sum = Add(x, y) n = {normed('sum')} out = Neg(n) }}", WEIGHTS)
    graph.model.graph.node(0).outputs[0].shape = ir.Shape([None, None, 8])
    feed = {"x": X[:1], "y": Y}
    before = run(graph, WEIGHTS, **feed)
    outcome = fuse_skip_rms_norm(graph)
    assert (outcome.matches, len(outcome.misses)) == (0, 1)
    np.testing.assert_array_equal(run(outcome.graph, WEIGHTS, **feed), before)


def test_a_norm_per_head_is_left_and_reported() -> None:
    """[batch, seq, heads, head_dim]: the operator takes three axes only."""
    ports = "(float[batch, seq, 2, 8] x, float[batch, seq, 2, 8] y) => (float[batch, seq, 2, 8] out)"
    graph = bound_graph(f"heads {ports} {{ sum = Add(x, y) n = {normed('sum')} out = Neg(n) }}", WEIGHTS)
    outcome = fuse_skip_rms_norm(graph)
    assert (outcome.matches, len(outcome.misses)) == (0, 1)


def test_a_norm_of_an_input_or_a_matmul_is_left_and_reported() -> None:
    graph = bound_graph(
        f"""no_sum {PORTS} {{
            n = {normed("x")}
            product = Mul(n, y)
            m = {normed("product")}
            out = Neg(m)
        }}""",
        WEIGHTS,
    )
    before = run(graph, WEIGHTS, x=X, y=Y)
    outcome = fuse_skip_rms_norm(graph)
    assert outcome.matches == 0
    assert outcome.misses == ("node_n: its input is not a sum", "node_m: its input is not a sum")
    np.testing.assert_array_equal(run(outcome.graph, WEIGHTS, x=X, y=Y), before)


def test_the_contrib_domain_is_imported_only_where_it_is_used() -> None:
    fused = bound_graph(f"pair {PORTS} {{ sum = Add(x, y) n = {normed('sum')} out = Neg(n) }}", WEIGHTS, ())
    assert fuse_skip_rms_norm(fused).graph.model.graph.opset_imports == {"": 18, "com.microsoft": 1}
    left = bound_graph(f"none {PORTS} {{ n = {normed('x')} out = Add(n, y) }}", WEIGHTS, ())
    assert fuse_skip_rms_norm(left).graph.model.graph.opset_imports == {"": 18}
