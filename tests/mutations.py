"""In: a bundle's folder that a test may change, and its target. Out: the same folder, one thing in it wrong.

Guaranteed: each mutation is one that the runtimes load and run; a file is replaced, never written through a hard
link, so that what the folder was linked from stays whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from builder.contract import DECODER, EMBEDDINGS, RESIDUAL, VISION
from builder.files import write_text

Mutation = Callable[[Path, str], None]


def deepstack_zeroed(bundle: Path, target: str) -> None:
    """The vision encoder's DeepStack features times 0; its main features stay."""
    with edited(bundle, VISION) as graph:
        zero = _constant(graph, "zero", np.float32(0))
        if target == "genai":
            packing = graph.outputs[0].producer()
            assert packing is not None
            assert packing.op_type == "Concat"
            for index, level in list(enumerate(packing.inputs))[1:]:
                _into_input(graph, packing, index, ir.node("Mul", [level, zero]))
        else:
            features = _port(graph.outputs, "deepstack_features")
            _as_output(graph, features, ir.node("Mul", [features, zero]))


def rotary_axes_swapped(bundle: Path, target: str) -> None:
    """The decoder takes a position's height for its width and the other way round."""
    with edited(bundle, DECODER) as graph:
        positions = _port(graph.inputs, "position_ids")
        order = _constant(graph, "time_width_height", np.array([0, 2, 1], np.int64))
        _behind_input(graph, positions, ir.node("Gather", [positions, order], {"axis": 0}))


def image_features_shifted(bundle: Path, target: str) -> None:
    """Each image token takes the features of the next one, the last one those of the first."""
    with edited(bundle, EMBEDDINGS if target == "genai" else VISION) as graph:
        if target == "genai":
            features = _port(graph.inputs, "image_features")
            _behind_input(graph, features, *_rolled(graph, features))
        else:
            features = _port(graph.outputs, "pooled_embeds")
            _as_output(graph, features, *_rolled(graph, features))


def mlp_scaled(bundle: Path, target: str, layer: int = 3) -> None:
    """What the feed-forward network of one decoder layer adds to the residual stream, 1 % too large."""
    with edited(bundle, DECODER) as graph:
        (node,) = [node for node in graph if any(value.name == f"{RESIDUAL}.{layer}" for value in node.outputs)]
        _into_input(graph, node, 1, ir.node("Mul", [node.inputs[1], _constant(graph, "more", np.float32(1.01))]))


def layers_swapped(bundle: Path, target: str, layers: tuple[int, int] = (1, 2)) -> None:
    """Two decoder layers read each other's down projection."""
    with edited(bundle, DECODER) as graph:
        one, two = (
            next(v for n, v in graph.initializers.items() if n.endswith(f"layers.{layer}.mlp.down_proj.weight"))
            for layer in layers
        )
        one.const_value, two.const_value = two.const_value, one.const_value


def attention_mask_off_by_one(bundle: Path, target: str) -> None:
    """Eager: a query sees one token behind itself. Fused: the operator counts one token too few."""
    with edited(bundle, DECODER) as graph:
        fused = [node for node in graph if node.op_type == "GroupQueryAttention"]
        if fused:
            _shift_input(graph, fused, index=5, by=_constant(graph, "one", np.int32(-1)))
        else:
            causal = [node for node in graph if node.op_type == "LessOrEqual"]
            _shift_input(graph, causal, index=1, by=_constant(graph, "one", np.int64(1)))


def mean_changed(bundle: Path, target: str) -> None:
    """The mean of one channel."""
    _edit_normalize(bundle, "mean")


def std_changed(bundle: Path, target: str) -> None:
    """The standard deviation of one channel."""
    _edit_normalize(bundle, "std")


def patch_size_changed(bundle: Path, target: str) -> None:
    """Half of the patch size, in every step that has one."""

    def halve(steps: list[dict[str, Any]]) -> None:
        for step in steps:
            if "patch_size" in step.get("attrs", {}):
                step["attrs"]["patch_size"] //= 2

    _edit_steps(bundle, halve)


def newline_lost(bundle: Path, target: str) -> None:
    """The line break at the end of the prompt, behind which the answer begins."""
    path = bundle / "pipeline.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    assert settings["prompt"]["suffix"].endswith("\n")
    settings["prompt"]["suffix"] = settings["prompt"]["suffix"][:-1]
    write_text(path, json.dumps(settings))


@contextmanager
def edited(bundle: Path, name: str) -> Iterator[ir.Graph]:
    """A graph to change; its weights stay in the file that they are in."""
    path = bundle / f"{name}.onnx"
    model = ir.load(path)
    yield model.graph
    part = bundle / f"{name}.onnx.part"
    ir.save(model, part)
    part.replace(path)


def _port(ports: Any, name: str) -> ir.Value:
    (found,) = [port for port in ports if port.name == name]
    assert isinstance(found, ir.Value)
    return found


def _constant(graph: ir.Graph, name: str, value: Any) -> ir.Value:
    constant = ir.val(f"mutation_{name}", const_value=ir.tensor(np.asarray(value), name=f"mutation_{name}"))
    graph.register_initializer(constant)
    return constant


def _rolled(graph: ir.Graph, value: ir.Value) -> list[ir.Node]:
    """Rows 1, 2, … , 0."""
    numbers = (0, 1, np.iinfo(np.int64).max)
    zero, one, end = (_constant(graph, f"row_{n}", np.array([n], np.int64)) for n in numbers)
    first, rest = ir.node("Slice", [value, zero, one, zero]), ir.node("Slice", [value, one, end, zero])
    return [first, rest, ir.node("Concat", [rest.outputs[0], first.outputs[0]], {"axis": 0})]


def _shift_input(graph: ir.Graph, nodes: list[ir.Node], *, index: int, by: ir.Value) -> None:
    assert nodes
    for node in nodes:
        _into_input(graph, node, index, ir.node("Add", [node.inputs[index], by]))


def _into_input(graph: ir.Graph, node: ir.Node, index: int, fresh: ir.Node) -> None:
    graph.insert_before(node, [fresh])
    node.replace_input_with(index, fresh.outputs[0])


def _behind_input(graph: ir.Graph, port: ir.Value, *fresh: ir.Node) -> None:
    """Whatever reads the port reads the last of the fresh nodes."""
    readers = [(node, index) for node, index in port.uses() if node not in fresh]
    assert readers
    graph.insert_before(graph[0], fresh)
    for node, index in readers:
        node.replace_input_with(index, fresh[-1].outputs[0])


def _as_output(graph: ir.Graph, port: ir.Value, *fresh: ir.Node) -> None:
    """The last of the fresh nodes gives what the port gave."""
    result = fresh[-1].outputs[0]
    result.name, result.shape, result.type = port.name, port.shape, port.type
    port.name = f"{port.name}_whole"
    graph.extend(fresh)
    graph.outputs[list(graph.outputs).index(port)] = result


def _edit_normalize(bundle: Path, key: str) -> None:
    def change(steps: list[dict[str, Any]]) -> None:
        (attributes,) = [step["attrs"] for step in steps if "qwen3_vl" in step.get("attrs", {})]
        attributes[key][0] *= 1.01

    _edit_steps(bundle, change)


def _edit_steps(bundle: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    path = bundle / "vision_processor.json"
    before = path.read_text(encoding="utf-8")
    settings = json.loads(before)
    change([transform["operation"] for transform in settings["processor"]["transforms"]])
    assert settings != json.loads(before)
    write_text(path, json.dumps(settings))
