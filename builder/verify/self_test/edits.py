"""Edits of a bundle's graphs and settings, for breaking a copy on purpose.

In: a folder whose files may be hard links to a bundle's. Out: the same folder, one thing in it changed.
Guaranteed: a file is replaced, never written through a link, so that what the folder was linked from stays whole;
weights stay in the file that they are in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from builder.bundle.layout import graph_files
from builder.targets.graphs import GRAPHS
from builder.util.files import atomic_write, write_text

DOWN = "layers.{}.mlp.down_proj.weight"


class InapplicableError(Exception):
    """Why a bundle cannot be broken in this way."""


@contextmanager
def edited(bundle: Path, name: str) -> Iterator[ir.Graph]:
    """A graph to change, by its role."""
    path = graph_files(bundle).get(name, bundle / f"{name}.onnx")
    model = ir.load(path)
    yield model.graph
    with atomic_write(path) as part:
        ir.save(model, part)


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    """A JSON file to change.

    Raises:
        ValueError: nothing has changed.
    """
    before = path.read_text(encoding="utf-8")
    document = json.loads(before)
    change(document)
    if document == json.loads(before):
        raise ValueError(f"{path.name} is what it was")
    write_text(path, json.dumps(document))


def port(ports: Any, name: str) -> ir.Value:
    """The graph's input or output of that name."""
    (found,) = [one for one in ports if one.name == name]
    assert isinstance(found, ir.Value)
    return found


def constant(graph: ir.Graph, name: str, value: Any) -> ir.Value:
    """A new initializer."""
    made = ir.val(f"mutation_{name}", const_value=ir.tensor(np.asarray(value), name=f"mutation_{name}"))
    graph.register_initializer(made)
    return made


def weight(graph: ir.Graph, ending: str) -> ir.Value:
    """The initializer whose name ends so; of a matrix that is quantized, its levels."""
    endings = (ending, f"{ending}.levels", f"{ending}.stored")
    (found,) = [value for name, value in graph.initializers.items() if name.endswith(endings)]
    return found


def need_layer(graph: ir.Graph, layer: int) -> None:
    """
    Raises:
        InapplicableError: the decoder has fewer layers.
    """
    if not any(DOWN.format(layer) in name for name in graph.initializers):
        raise InapplicableError(f"the decoder has no layer {layer}")


def numbers(value: ir.Value) -> np.ndarray:
    """What an initializer holds; read here, as onnx_ir reads no data file that has several hard links."""
    tensor = value.const_value
    assert tensor is not None
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    shape = tensor.shape.numpy()
    flat = np.fromfile(tensor.path, tensor.dtype.numpy(), math.prod(shape), offset=tensor.offset or 0)
    return flat.reshape(shape)


def reader(value: ir.Value) -> ir.Node:
    """The one node that reads the value; behind the cast where it is stored in less than it is computed in."""
    (node,) = value.consumers()
    return reader(node.outputs[0]) if node.op_type == "Cast" and value.is_initializer() else node


def into_input(graph: ir.Graph, node: ir.Node, index: int, *fresh: ir.Node) -> None:
    """The node reads the last of the fresh nodes there."""
    graph.insert_before(node, fresh)
    node.replace_input_with(index, fresh[-1].outputs[0])


def behind(graph: ir.Graph, value: ir.Value, *fresh: ir.Node) -> None:
    """Whatever reads the value, no output of the graph, reads the last of the fresh nodes: same type and shape."""
    result = fresh[-1].outputs[0]
    # A slice of the graph (builder/verify/graphs/slices.py) may begin between this node and one that reads it.
    result.type, result.shape = value.type, value.shape
    readers = [(node, index) for node, index in value.uses() if node not in fresh]
    assert readers
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], fresh)
    else:
        graph.insert_after(producer, fresh)
    for node, index in readers:
        node.replace_input_with(index, result)


def as_output(graph: ir.Graph, value: ir.Value, *fresh: ir.Node) -> None:
    """The last of the fresh nodes gives what the graph's output gave."""
    result = fresh[-1].outputs[0]
    result.name, result.shape, result.type = value.name, value.shape, value.type
    value.name = f"{value.name}_whole"
    graph.extend(fresh)
    graph.outputs[list(graph.outputs).index(value)] = result


def rolled(graph: ir.Graph, value: ir.Value) -> list[ir.Node]:
    """Rows 1, 2, … , 0."""
    numbers = (0, 1, np.iinfo(np.int64).max)
    zero, one, end = (constant(graph, f"row_{n}", np.array([n], np.int64)) for n in numbers)
    first, rest = ir.node("Slice", [value, zero, one, zero]), ir.node("Slice", [value, one, end, zero])
    return [first, rest, ir.node("Concat", [rest.outputs[0], first.outputs[0]], {"axis": 0})]


def feature_levels(graph: ir.Graph, target: str) -> tuple[ir.Node, list[int]]:
    """The node that makes the output with the DeepStack levels, and which of its inputs they are.

    Raises:
        InapplicableError: the checkpoint has none.
    """
    runtime = GRAPHS[target]
    name = runtime.features if runtime.packed else "deepstack_features"
    found = [one.producer() for one in graph.outputs if one.name == name]
    node = found[0] if found else None
    packed = node is not None and node.op_type == "Concat"
    if node is None or (runtime.packed and not packed):
        raise InapplicableError("the checkpoint has no DeepStack")
    if runtime.packed:
        return node, list(range(1, len(node.inputs)))
    # One level alone is not put beside others.
    return node, list(range(len(node.inputs))) if packed else [0]


def zeros_behind(graph: ir.Graph, value: ir.Value, start: ir.Value) -> list[ir.Node]:
    """The rows from `start` on (int64 [1]) become 0."""
    numbers = (0, np.iinfo(np.int64).max)
    zero, end = (constant(graph, f"from_{n}", np.array([n], np.int64)) for n in numbers)
    kept = ir.node("Slice", [value, zero, start, zero])
    lost = ir.node("Slice", [value, start, end, zero])
    blank = ir.node("Mul", [lost.outputs[0], constant(graph, "nothing", np.float32(0))])
    return [kept, lost, blank, ir.node("Concat", [kept.outputs[0], blank.outputs[0]], {"axis": 0})]


def steps(document: Any, kind: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The attributes of the steps in vision_processor.json that have all the keys of `kind`."""
    found = [transform["operation"].get("attrs", {}) for transform in document["processor"]["transforms"]]
    return [one for one in found if all(key in one for key in kind)]
