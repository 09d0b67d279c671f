"""convert_precision: fp16 for values that depend on ports and weights, fp32 for those that depend on integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from builder.graph.binding import UNBOUND, BoundGraph
from builder.graph.passes.convert_precision import convert_precision
from builder.graph.passes.lower_segment_attention import lower_segment_attention
from builder.graph.passes.quantize_weights import quantize_weights
from builder.graph.passes.result import PassResult
from builder.quantization.blockwise import Blocks
from builder.quantization.rules import WeightFormat
from tests.helpers.small_graphs import Array, Weights, bound_graph, drawn, operators, run

HALF = ir.DataType.FLOAT16
# x is converted; angles depend on positions alone and are multiplied with it.
ROTARY = """
rotary (float[batch, seq, 8] x, int64[batch, seq] positions) => (float[batch, seq, 8] y, float[batch, seq, 8] kept)
{
    placed = Cast <to = 1> (positions)
    axis = Constant <value_ints = [2]> ()
    column = Unsqueeze(placed, axis)
    angles = Mul(column, speeds)
    turned = Cos(angles)
    h = MatMul(x, w)
    y = Mul(h, turned)
    kept = Add(x, half)
}
"""
WEIGHTS = {"w": drawn(8, 8)}


def inferred(graph: BoundGraph) -> BoundGraph:
    """The graph with types, which ONNX can infer once the constants are there."""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(graph.model)))
    return BoundGraph(model, graph.bindings)


def rotary() -> BoundGraph:
    """`speeds` and `half` are constants, not bound to checkpoint tensors."""
    speeds = np.array([1, 0.1, 0.01, 1e-3, 1, 0.1, 0.01, 1e-3], np.float32)
    extra = {"speeds": speeds, "half": np.full(8, 0.5, np.float32)}
    text = ROTARY.replace("x, int64", "x, float[8] speeds, float[8] half, int64")
    graph = bound_graph(text, WEIGHTS)
    model = graph.model
    for name, array in extra.items():
        (value,) = [port for port in model.graph.inputs if port.name == name]
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        model.graph.initializers.add(value)
    return graph


def halved(weights: Weights) -> dict[str, Array]:
    return {name: array.astype(np.float16) for name, array in weights.items()}


def types(graph: BoundGraph) -> Mapping[str, ir.DataType | None]:
    return {str(value.name): value.dtype for node in graph.model.graph for value in node.outputs}


def producer(graph: BoundGraph, name: str) -> ir.Node:
    (found,) = [node for node in graph.model.graph for value in node.outputs if value.name == name]
    return found


def read(node: ir.Node) -> list[tuple[str, bool]]:
    """Each input's name, and whether it is cast first."""
    found = []
    for value in node.inputs:
        assert value is not None
        cast = value.producer()
        through = cast is not None and cast.op_type == "Cast" and cast.inputs[0] is not None
        source = cast.inputs[0] if through and cast is not None else value
        assert source is not None
        found.append((str(source.name), through))
    return found


def test_ports_weights_and_what_depends_on_them_are_fp16() -> None:
    graph = convert_precision(rotary(), "fp16").graph
    assert [port.dtype for port in graph.model.graph.inputs] == [HALF, ir.DataType.INT64]
    assert [port.dtype for port in graph.model.graph.outputs] == [HALF, HALF]
    assert [binding.dtype for binding in graph.bindings.values()] == ["float16"]
    weight = graph.model.graph.initializers["w"]
    assert weight.dtype == HALF
    assert isinstance(weight.const_value, ir.ExternalTensor)
    assert weight.const_value.location == UNBOUND
    assert types(graph)["h"] == HALF


def test_ports_that_stay_fp32_are_cast_and_keep_their_names() -> None:
    graph = convert_precision(rotary(), "fp16", (), ("x", "kept")).graph
    assert [port.dtype for port in graph.model.graph.inputs] == [ir.DataType.FLOAT, ir.DataType.INT64]
    assert {str(port.name): port.dtype for port in graph.model.graph.outputs} == {"y": HALF, "kept": ir.DataType.FLOAT}
    assert types(graph)["h"] == HALF
    assert producer(graph, "kept").op_type == "Cast"
    x, places = drawn(1, 4, 8), np.arange(4, dtype=np.int64)[None]
    weights = halved(WEIGHTS)
    y, kept = run(inferred(graph), weights, x=x, positions=places)
    assert [str(output.dtype) for output in (y, kept)] == ["float16", "float32"]
    assert np.allclose(kept, x + 0.5, atol=2e-3)


def test_what_depends_on_integers_stays_fp32_and_is_cast_where_it_is_read() -> None:
    graph = convert_precision(rotary(), "fp16").graph
    found = types(graph)
    assert {found[name] for name in ("placed", "column", "angles", "turned")} == {ir.DataType.FLOAT}
    assert read(producer(graph, "y")) == [("h", False), ("turned", True)]
    assert operators(graph)["Cast"] == 3  # of positions, of the cosine, and of a constant


@pytest.mark.parametrize("start", [0, 30_000])
def test_positions_beyond_the_integers_of_fp16_are_exact(start: int) -> None:
    """30,001 is not representable in fp16, so that its cosine would be wrong."""
    feed: dict[str, Any] = {"x": drawn(2, 5, 8), "positions": np.arange(start, start + 10).reshape(2, 5)}
    want = run(rotary(), WEIGHTS, **feed)
    outcome = convert_precision(rotary(), "fp16")
    got = run(outcome.graph, halved(WEIGHTS), **(feed | {"x": feed["x"].astype(np.float16)}))
    for half, full in zip(got, want, strict=True):
        assert half.dtype == np.float16
        np.testing.assert_allclose(half, full, atol=0.02)
    assert outcome.matches == 3  # MatMul, Mul and Add


def test_a_constant_is_cast_for_fp16_readers_and_kept_for_fp32_readers() -> None:
    graph = convert_precision(rotary(), "fp16").graph
    initializers = graph.model.graph.initializers
    assert {initializers[name].dtype for name in ("half", "speeds")} == {ir.DataType.FLOAT}
    assert read(producer(graph, "kept")) == [("x", False), ("half", True)]
    assert read(producer(graph, "angles")) == [("column", False), ("speeds", False)]


def test_bf16_is_another_type_of_the_same_graph() -> None:
    """Types only: onnxruntime has no bf16 matmul on CPUs."""
    graph = convert_precision(rotary(), "bf16").graph
    brain = ir.DataType.BFLOAT16
    assert {port.dtype for port in graph.model.graph.outputs} == {brain}
    assert [binding.dtype for binding in graph.bindings.values()] == ["bfloat16"]
    assert [None if value is None else value.dtype for value in producer(graph, "y").inputs] == [brain, brain]


def test_a_cast_of_a_converted_value_is_to_fp16() -> None:
    text = "cast (float[n] x) => (float[n] y) { e = Cast <to = 1> (x) y = Neg(e) }"
    graph = convert_precision(bound_graph(text), "fp16").graph
    assert producer(graph, "e").attributes.get_int("to", 0) == HALF
    x = drawn(5).astype(np.float16)
    np.testing.assert_array_equal(run(graph, x=x)[0], -x)


def test_pixel_values_stay_fp32() -> None:
    """As preprocessing gives them; they are cast after the port."""
    text = "vision (float[n, 8] pixel_values) => (float[n, 8] y) { y = MatMul(pixel_values, w) }"
    pixels = drawn(3, 8)
    graph = convert_precision(bound_graph(text, WEIGHTS), "fp16").graph
    assert [port.dtype for port in graph.model.graph.inputs] == [ir.DataType.FLOAT]
    (got,) = run(graph, halved(WEIGHTS), pixel_values=pixels)
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, pixels @ WEIGHTS["w"], atol=0.02)


def test_shapes_are_not_converted() -> None:
    text = """shapes (float[n, 4] x) => (float[n, 4] y, float[1] rows) {
        shape = Shape <start = 0, end = 1> (x)
        rows = Cast <to = 1> (shape)
        y = Neg(x)
    }"""
    graph = convert_precision(bound_graph(text), "fp16").graph
    assert types(graph)["shape"] == ir.DataType.INT64
    y, rows = run(graph, x=drawn(3, 4).astype(np.float16))
    assert y.dtype == rows.dtype == np.float16
    assert rows.tolist() == [3]
    assert [port.name for port in graph.model.graph.outputs] == ["y", "rows"]


def test_a_port_after_a_fp32_layer_is_fp16() -> None:
    """The output is cast, while the graph reads the fp32 value."""
    text = LAYERS.replace("float[n, 4] y)", "float[n, 4] y, float[n, 4] c)")
    x = drawn(3, 4)
    want = run(layers(text=text), LARGE, x=x)
    graph = convert_precision(layers(text=text), "fp16", [0]).graph
    assert [(port.name, port.dtype) for port in graph.model.graph.outputs] == [("y", HALF), ("c", HALF)]
    for got, expected in zip(run(graph, halved(LARGE), x=x.astype(np.float16)), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0.02, atol=0.05)


SEGMENTS = """
attention (float[patches, 8] q, float[patches, 8] k, float[patches, 8] v,
           int64[patches] begin, int64[patches] end) => (float[patches, 8] out)
{ attended = qwen3vl.SegmentAttention <num_heads = 2, scale = 0.3> (q, k, v, begin, end) out = Neg(attended) }
"""


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])
@pytest.mark.parametrize("lengths", [(4, 12, 1), (6,)], ids=str)
def test_bodies_of_loops_are_converted_too(fused: bool, lengths: tuple[int, ...]) -> None:
    def lowered() -> BoundGraph:
        graph = lower_segment_attention(bound_graph(SEGMENTS, None, ["qwen3vl"]), fused=fused, block=3).graph
        return inferred(graph)

    ends = np.cumsum(lengths, dtype=np.int64)
    feed = {name: drawn(sum(lengths), 8, seed=seed) for seed, name in enumerate("qkv")}
    ranges = {"begin": np.repeat(ends - np.asarray(lengths), lengths), "end": np.repeat(ends, lengths)}
    (want,) = run(lowered(), **feed, **ranges)
    graph = convert_precision(lowered(), "fp16").graph
    (got,) = run(graph, **halved(feed), **ranges)
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, want, atol=5e-3)
    assert operators(graph)["Loop"]


# Two layers with a residual stream; values inside the first layer exceed fp16, its output does not. Identity has an
# fp16 kernel: without two of them, onnxruntime's CPU provider would pass on the fp32 that it multiplies in.
LAYERS = """
layers (float[n, 4] x) => (float[n, 4] y)
{
    a = MatMul(x, up)
    b = MatMul(a, up)
    held = Identity(b)
    kept = Identity(held)
    c = MatMul(kept, down)
    residual.0 = Add(x, c)
    d = MatMul(residual.0, own)
    residual.1 = Add(residual.0, d)
    y = MatMul(residual.1, own)
}
"""
LARGE: Weights = {
    "up": 400 * np.eye(4, dtype=np.float32),
    "down": np.eye(4, dtype=np.float32) / 160000,
    "own": drawn(4, 4),
}


def layers(weights: Weights = LARGE, text: str = LAYERS) -> BoundGraph:
    graph = bound_graph(text.replace("residual.", "residual_"), weights)
    for node in graph.model.graph:
        for value in node.outputs:
            value.name = str(value.name).replace("residual_", "residual.")
    return graph


def both(wide: list[int]) -> tuple[PassResult, Array, Array]:
    """The result of the pass, the output of its graph, and the output in fp32."""
    x = 1 + np.abs(drawn(3, 4))
    (want,) = run(layers(), LARGE, x=x)
    outcome = convert_precision(layers(), "fp16", wide)
    (got,) = run(outcome.graph, halved(LARGE), x=x.astype(np.float16))
    return outcome, got, want


def test_a_layer_that_overflows_is_finite_and_correct_in_fp32() -> None:
    outcome, got, want = both([0])
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, want, rtol=0.02, atol=0.05)
    found = types(outcome.graph)
    assert {found[name] for name in ("a", "b", "c", "residual.0")} == {ir.DataType.FLOAT}
    assert {found[name] for name in ("d", "y")} == {HALF}
    assert {binding.dtype for binding in outcome.graph.bindings.values()} == {"float16"}
    assert outcome.matches == 3  # of nine, six are wide


@pytest.mark.parametrize("wide", [[], [1]], ids=str)
def test_it_overflows_in_fp16(wide: list[int]) -> None:
    """A control: the values above exceed fp16."""
    with np.errstate(all="ignore"):
        _, got, want = both(wide)
    assert np.isfinite(want).all()
    assert not np.isfinite(got).any()


def test_adjacent_fp32_layers_pass_on_fp32() -> None:
    outcome, got, want = both([0, 1])
    np.testing.assert_allclose(got, want, rtol=0.02, atol=0.05)
    found = types(outcome.graph)
    assert {found[name] for name in ("residual.0", "d", "residual.1")} == {ir.DataType.FLOAT}
    assert found["y"] == HALF


def test_a_value_is_cast_once_however_many_read_it() -> None:
    outcome, _, _ = both([0])
    casts = [node for node in outcome.graph.model.graph if node.op_type == "Cast"]
    read = [(node.inputs[0].name if node.inputs[0] else "", node.outputs[0].dtype) for node in casts]
    assert len(read) == len(set(read))
    assert {name for name, _ in read} == {"x", "up", "down", "residual.0"}


def test_parts_of_quantized_matrices_are_left_as_they_are() -> None:
    """Scales are fp16 already (builder/stages/quantize.py), codes are integers."""
    text = "product (float[n, 32] x) => (float[n, 4] y) { y = MatMul(x, w) }"
    graph = bound_graph(text, {"w": drawn(32, 4)})
    bindings = {"w": replace(graph.bindings["w"], shape=(4, 32), transposed=True)}
    quantized = quantize_weights(
        BoundGraph(graph.model, bindings), {"checkpoint.w": WeightFormat(Blocks(4, 32), 4)}, "float16"
    )
    found = convert_precision(quantized.graph, "fp16").graph
    types_of_parts = {name: binding.dtype for name, binding in found.bindings.items()}
    assert types_of_parts == {"w.levels": "uint8", "w.scales": "float16"}
    assert [output.dtype for output in found.model.graph.outputs] == [HALF]
