"""unroll: repeating a few traced layers gives the same graph as tracing all layers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from builder.checkpoint.load import open_checkpoint
from builder.graph.binding import BoundGraph, bind
from builder.graph.ports import RESIDUAL, Component, Port
from builder.graph.unroll import LAYER, LayerKinds, shortened, unroll
from builder.reference.meta_model import empty_model
from builder.stages import export
from builder.targets.graphs import components
from builder.targets.recipe import Target
from builder.util.errors import PassError
from patches import patches_for
from patches.registry import applied
from tests.helpers.checkpoints import MINIATURE, write_checkpoint
from tests.helpers.small_graphs import bound_graph, drawn, run

pytestmark = pytest.mark.torch

GENAI, PLAIN = Target("genai", "fused"), Target("onnxruntime", "eager")


def unmarked(graph: BoundGraph) -> BoundGraph:
    """A full trace without its marks, with the stream named as `unroll` names it."""
    marks = [node for node in graph.model.graph if node.op_type == LAYER]
    for number, mark in enumerate(marks):
        stream = mark.inputs[0]
        assert stream is not None
        if number:
            stream.name = f"{RESIDUAL}.{number - 1}"
        mark.outputs[0].replace_all_uses_with(stream)
        graph.model.graph.remove(mark, safe=True)
    return graph


def computed(graph: BoundGraph) -> dict[str, str]:
    """Each output, and the stream after each layer → a digest of everything that it is computed from, and how."""
    known: dict[ir.Value | None, str] = {None: ""}
    for value in graph.model.graph.inputs:
        known[value] = f"{value.name} {value.shape} {value.dtype}"
    for name, value in graph.model.graph.initializers.items():
        bound, constant = graph.bindings.get(name), value.const_value
        known[value] = repr(bound) if bound or constant is None else repr(constant.numpy().tobytes())
    named: dict[str, str] = {}
    for node in graph.model.graph:
        attributes = [(key, str(attribute.value)) for key, attribute in sorted(node.attributes.items())]
        text = repr((node.domain, node.op_type, attributes, [known[value] for value in node.inputs]))
        for index, value in enumerate(node.outputs):
            known[value] = hashlib.sha256(f"{text} {index}".encode()).hexdigest()
            if value.is_graph_output() or str(value.name).startswith(RESIDUAL):
                named[str(value.name)] = known[value]
    return named


@pytest.mark.parametrize("target", [GENAI, pytest.param(PLAIN, marks=pytest.mark.slow)], ids=lambda t: t.runtime)
@pytest.mark.parametrize(
    "shape",
    [
        "miniature",
        pytest.param("deepstack0", marks=pytest.mark.slow),
        pytest.param("patch14merge3", marks=pytest.mark.slow),
        pytest.param("biased", marks=pytest.mark.slow),
    ],
)
def test_repeated_layers_are_traced_layers(checkpoint: Callable[[str], Path], shape: str, target: Target) -> None:
    opened = open_checkpoint(MINIATURE if shape == "miniature" else checkpoint(shape))
    few, whole = empty_model(shortened(opened)), empty_model(opened)
    with applied(patches_for(target.attention)):
        for component in components(opened, target.runtime):
            got = export.export(opened, few, target, component)
            want = unmarked(export.trace(opened, whole, target, component))
            assert got.bindings == want.bindings
            assert computed(got) == computed(want)
            layers = {"vision_encoder": opened.vision.depth, "model": opened.text.layers}.get(component.name, 0)
            assert sum(name.startswith(RESIDUAL) for name in computed(got)) == layers
            assert [value.name for value in got.model.graph.inputs] == [port.name for port in component.inputs]


@pytest.mark.parametrize(
    ("layers", "deepstack", "traced", "copies"),
    [
        (5, (0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3, 3)),
        (24, (5, 11, 17), (0, 5, 11, 17), (0,) * 5 + (1,) + (0,) * 5 + (2,) + (0,) * 5 + (3,) + (0,) * 6),
        (3, (2, 0), (0, 1, 2), (0, 1, 2)),
        (3, (0, 1, 2), (0, 1, 2), (0, 1, 2)),
        (4, (), (0,), (0, 0, 0, 0)),
    ],
)
def test_kinds(layers: int, deepstack: tuple[int, ...], traced: tuple[int, ...], copies: tuple[int, ...]) -> None:
    assert LayerKinds.of(layers, deepstack) == LayerKinds(traced, copies)


def test_the_shortened_model_keeps_the_order_of_deepstack(tmp_path: Path) -> None:
    """`deepstack_visual_indexes` pairs each merger with its layer, and need not be sorted."""
    folder = write_checkpoint(tmp_path / "one", vision={"depth": 7}, deepstack=(5, 1, 3), text={"num_hidden_layers": 9})
    short = shortened(open_checkpoint(folder))
    assert (short.vision.depth, short.vision.deepstack, short.text.layers) == (4, (3, 1, 2), 4)
    assert short.config["vision_config"]["deepstack_visual_indexes"] == [3, 1, 2]


TOY = Component("toy", (Port("x", "float32", ("seq", 4)),), (Port("y", "float32", ("seq", 4)),))


def toy(layer_1: str) -> BoundGraph:
    """Two layers of a single weight each; `inside.N` is within layer N."""
    graph = bound_graph(
        f"""toy (float[seq, 4] x) => (float[seq, 4] y) {{
            in = qwen3vl.Layer (x)
            inside_0 = Mul (in, w0)
            behind_0 = Add (in, inside_0)
            out_0 = qwen3vl.Layer (behind_0)
            inside_1 = Mul (out_0, w1)
            behind_1 = Add ({layer_1}, inside_1)
            out_1 = qwen3vl.Layer (behind_1)
            y = Relu (out_1)
        }}""",
        {"w0": np.ones(4, np.float32), "w1": np.ones(4, np.float32)},
        domains=("qwen3vl",),
    )
    bindings = []
    for index in range(2):  # the text format allows no dots
        graph.model.graph.initializers[f"w{index}"].name = name = f"layers.{index}.w"
        bindings.append(replace(graph.bindings[f"w{index}"], initializer=name, tensor=f"checkpoint.{name}"))
    return bind(graph.model, bindings)


def test_toy_layers_in_any_number_compute_the_right_values() -> None:
    graph = unroll(toy("out_0"), LayerKinds((0, 1), (0, 1, 1, 0)), TOY)
    assert list(graph.bindings) == [f"layers.{index}.w" for index in range(4)]
    assert [graph.bindings[f"layers.{index}.w"].tensor for index in range(4)] == [
        f"checkpoint.layers.{index}.w" for index in range(4)
    ]
    weights = {f"layers.{index}.w": drawn(4, seed=index) for index in range(4)}
    x = drawn(3, 4)
    want = x
    for weight in weights.values():
        want = want + want * weight
    (got,) = run(graph, weights, x=x)
    np.testing.assert_array_equal(got, np.maximum(want, 0))


def test_a_layer_that_reads_inside_a_repeated_layer_is_refused() -> None:
    with pytest.raises(PassError, match="reads what another layer computes") as caught:
        unroll(toy("inside_0"), LayerKinds((0, 1), (0, 1, 0)), TOY)
    assert caught.value.found == "inside_0"


def test_a_graph_of_another_number_of_layers_is_refused() -> None:
    with pytest.raises(PassError, match="is not divided into layers") as caught:
        unroll(toy("out_0"), LayerKinds((0, 1, 2), (0, 1, 2)), TOY)
    assert (caught.value.expected, caught.value.found) == ("4 marks around 3 layers", "3 marks")
