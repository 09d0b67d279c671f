"""optimize: the passes of a target in order, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from builder.checkpoint.tensors import LM_HEAD
from builder.graph.binding import BoundGraph
from builder.graph.passes.registry import PASSES
from builder.stages.optimize import optimize
from builder.targets.graphs import GRAPHS, passes
from builder.targets.recipe import Target
from builder.util.errors import PassError
from tests.helpers.small_graphs import bound_graph, bound_to, drawn, operators, run

GENAI, PLAIN = Target("genai", "fused"), Target("onnxruntime", "eager")
WEIGHTS = {"up": drawn(8, 8), "down": drawn(8, 8, seed=1), "gain": 1 + 0.1 * drawn(8), "top": drawn(9, 8, seed=2)}
# A decoder layer in small, and a head: a residual sum, its norm, linear layers; shape arithmetic and a copy to fold.
LAYER = """
layer (float[batch, seq, 8] x) => (float[batch, seq, 9] y) {
    one = Constant <value = int64[1] {1}> ()
    two = Constant <value = int64[1] {2}> ()
    last = Sub(one, two)
    square = Cast <to = 1> (two)
    epsilon = Constant <value = float {1e-5}> ()
    turned = Transpose <perm = [1, 0]> (up)
    linear = MatMul(x, turned)
    sum = Add(x, linear)
    squares = Pow(sum, square)
    mean = ReduceMean <keepdims = 1, noop_with_empty_axes = 0> (squares, last)
    variance = Add(mean, epsilon)
    root = Sqrt(variance)
    inverse = Reciprocal(root)
    scaled = Mul(sum, inverse)
    normed = Mul(gain, scaled)
    copy = Identity(normed)
    back = Transpose <perm = [1, 0]> (down)
    again = MatMul(copy, back)
    stream = Add(sum, again)
    head = Transpose <perm = [1, 0]> (top)
    y = MatMul(stream, head)
}
"""


def decoder(text: str = LAYER, *domains: str) -> BoundGraph:
    """As traced: its last weight is the head."""
    return bound_to(bound_graph(text, WEIGHTS, ["com.microsoft", *domains]), top=LM_HEAD)


def test_every_target_lists_passes_that_exist() -> None:
    for name, graphs in GRAPHS.items():
        for graph in ("vision_encoder", "embeddings", "model"):
            for attention in graphs.attentions:
                assert set(passes(graph, Target(name, attention))) <= set(PASSES)


def test_the_passes_of_a_decoder_in_a_row() -> None:
    traced, x = decoder(LAYER, "qwen3vl"), drawn(2, 5, 8)
    before = run(decoder(), WEIGHTS, x=x)
    optimized, matches = optimize(traced, GENAI, "model")
    assert {name: matches[name] for name in list(matches)[1:]} == {
        "gemm_head": 1,
        "fold_weight_transposes": 2,
        "fuse_rms_norm": 1,
        "fuse_skip_rms_norm": 1,
    }
    assert operators(optimized) == {
        "MatMul": 2,
        "com.microsoft::SkipSimplifiedLayerNormalization": 1,
        "Add": 1,
        "Gemm": 1,
        "Reshape": 2,
        "Shape": 1,
        "Concat": 1,
    }
    assert optimized.model.graph.opset_imports == {"": 18, "com.microsoft": 1}
    np.testing.assert_allclose(run(optimized, WEIGHTS, x=x), before, rtol=1e-5, atol=1e-5)


def test_the_plain_target_keeps_to_standard_operators() -> None:
    traced, x = decoder(), drawn(2, 5, 8)
    before = run(traced, WEIGHTS, x=x)
    optimized, matches = optimize(traced, PLAIN, "model")
    assert list(matches) == ["simplify", "gemm_head", "fold_weight_transposes"]
    assert optimized.model.graph.opset_imports == {"": 18}
    np.testing.assert_allclose(run(optimized, WEIGHTS, x=x), before, rtol=1e-5, atol=1e-5)


def test_a_listed_pass_that_matches_nowhere_is_an_error_with_the_reason() -> None:
    """The weight has another reader, which folding would change."""
    text = LAYER.replace(
        "stream = Add(sum, again)", "other = MatMul(again, up) third = MatMul(other, down) stream = Add(sum, third)"
    )
    with pytest.raises(PassError) as caught:
        optimize(decoder(text), PLAIN, "model")
    assert "fold_weight_transposes matched nowhere in onnxruntime/model.onnx" in caught.value.what
    assert "up: not a plain transposition, or also read elsewhere" in str(caught.value.found)
    assert caught.value.next is not None


def test_a_decoder_without_a_head_is_an_error_with_the_candidates() -> None:
    with pytest.raises(PassError) as caught:
        optimize(bound_graph(LAYER, WEIGHTS), PLAIN, "model")
    assert "gemm_head matched nowhere in onnxruntime/model.onnx" in caught.value.what
    assert str(caught.value.found).count("no transposed head") == 3


@pytest.mark.parametrize(
    ("target", "name", "step"),
    [
        (GENAI, "model", "fuse_rms_norm"),
        (GENAI, "vision_encoder", "lower_segment_attention_fused"),
        (Target("genai", "eager"), "vision_encoder", "lower_segment_attention_eager"),
        (PLAIN, "vision_encoder", "lower_segment_attention_eager"),
    ],
)
def test_without_a_candidate_the_pass_is_named(target: Target, name: str, step: str) -> None:
    text = """linear (float[n, 8] x) => (float[n, 9] y) {
        copy = Identity(x)
        turned = Transpose <perm = [1, 0]> (up)
        hidden = MatMul(copy, turned)
        head = Transpose <perm = [1, 0]> (top)
        y = MatMul(hidden, head)
    }"""
    weights = {name: WEIGHTS[name] for name in ("up", "top")}
    with pytest.raises(PassError) as caught:
        optimize(bound_to(bound_graph(text, weights), top=LM_HEAD), target, name)
    assert f"pass {step} matched nowhere in {target.runtime}/{name}.onnx" in caught.value.what
    assert caught.value.found == "no candidate"


@pytest.mark.parametrize(
    "nodes",
    [
        pytest.param("y = com.microsoft.Gelu(x)", id="in the graph"),
        pytest.param(
            """y = If (really) <
                then_branch = yes () => (float[n, 8] a) { a = com.microsoft.Gelu(x) },
                else_branch = no () => (float[n, 8] b) { b = Neg(x) }
            >""",
            id="in a subgraph",
        ),
    ],
)
def test_an_operator_of_a_foreign_domain_is_an_error(nodes: str) -> None:
    traced = bound_graph(f"foreign (float[n, 8] x, bool really) => (float[n, 8] y) {{ {nodes} }}")
    with pytest.raises(PassError) as caught:
        optimize(traced, PLAIN, "embeddings")
    assert caught.value.what.startswith("onnxruntime/embeddings.onnx contains operators")
    assert caught.value.found == "com.microsoft::Gelu"
    assert caught.value.expected == "domains ['']"


def test_an_operator_that_was_not_lowered_is_foreign_to_every_target() -> None:
    text = """left (float[n, 8] x, int64[n] begin, int64[n] end) => (float[n, 8] y) {
        copy = Identity(x)
        y = qwen3vl.SegmentAttention <num_heads = 2, scale = 0.5> (copy, copy, copy, begin, end)
    }"""
    with pytest.raises(PassError) as caught:
        optimize(bound_graph(text, None, ["qwen3vl"]), GENAI, "embeddings")
    assert caught.value.found == "qwen3vl::SegmentAttention"
