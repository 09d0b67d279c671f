"""Edit the graphs and settings of a bundle's copy, to break it on purpose.

Guarantees: files are replaced, never written through hard links, so that the original bundle stays intact; weights stay
in their data files.
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
    """A bundle cannot be broken in this way; the message is the reason."""


@contextmanager
def edited(bundle: Path, name: str) -> Iterator[ir.Graph]:
    """Open a graph by its role, and save it on exit."""
    path = graph_files(bundle).get(name, bundle / f"{name}.onnx")
    model = ir.load(path)
    yield model.graph
    with atomic_write(path) as part:
        ir.save(model, part)


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    """Change a JSON file.

    Raises:
        ValueError: `change` changed nothing.
    """
    before = path.read_text(encoding="utf-8")
    document = json.loads(before)
    change(document)
    if document == json.loads(before):
        raise ValueError(f"{path.name} is unchanged")
    write_text(path, json.dumps(document))


def port(ports: Any, name: str) -> ir.Value:
    """Return the graph input or output of that name."""
    (value,) = [value for value in ports if value.name == name]
    assert isinstance(value, ir.Value)
    return value


def constant(graph: ir.Graph, name: str, value: Any) -> ir.Value:
    """Add an initializer to the graph."""
    initializer = ir.val(f"mutation_{name}", const_value=ir.tensor(np.asarray(value), name=f"mutation_{name}"))
    graph.register_initializer(initializer)
    return initializer


def weight(graph: ir.Graph, ending: str) -> ir.Value:
    """Return the initializer whose name has this ending; for a quantized matrix, its codes."""
    endings = (ending, f"{ending}.levels", f"{ending}.stored")
    (initializer,) = [value for name, value in graph.initializers.items() if name.endswith(endings)]
    return initializer


def need_layer(graph: ir.Graph, layer: int) -> None:
    """Check that the decoder has the layer.

    Raises:
        InapplicableError: the decoder has fewer layers.
    """
    if not any(DOWN.format(layer) in name for name in graph.initializers):
        raise InapplicableError(f"the decoder has no layer {layer}")


def numbers(value: ir.Value) -> np.ndarray:
    """Read an initializer; onnx_ir refuses data files with several hard links."""
    tensor = value.const_value
    assert tensor is not None
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    shape = tensor.shape.numpy()
    flat = np.fromfile(tensor.path, tensor.dtype.numpy(), math.prod(shape), offset=tensor.offset or 0)
    return flat.reshape(shape)


def reader(value: ir.Value) -> ir.Node:
    """Return the only node that reads the value, looking through the Cast of a stored weight."""
    (node,) = value.consumers()
    return reader(node.outputs[0]) if node.op_type == "Cast" and value.is_initializer() else node


def insert_before_input(graph: ir.Graph, node: ir.Node, index: int, *fresh: ir.Node) -> None:
    """Insert nodes before `node`, and make the last one its input `index`."""
    graph.insert_before(node, fresh)
    node.replace_input_with(index, fresh[-1].outputs[0])


def insert_after(graph: ir.Graph, value: ir.Value, *fresh: ir.Node) -> None:
    """Insert nodes after a value that is not a graph output; its readers then read the last node."""
    result = fresh[-1].outputs[0]
    # Type and shape are needed if builder/verify/graphs/slices.py cuts between this node and its readers.
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


def replace_output(graph: ir.Graph, value: ir.Value, *fresh: ir.Node) -> None:
    """Append nodes after a graph output; the last one takes over its name."""
    result = fresh[-1].outputs[0]
    result.name, result.shape, result.type = value.name, value.shape, value.type
    value.name = f"{value.name}_whole"
    graph.extend(fresh)
    graph.outputs[list(graph.outputs).index(value)] = result


def roll_rows(graph: ir.Graph, value: ir.Value) -> list[ir.Node]:
    """Return nodes that move the first row to the end: 1, 2, …, 0."""
    numbers = (0, 1, np.iinfo(np.int64).max)
    zero, first_row, end = (constant(graph, f"row_{n}", np.array([n], np.int64)) for n in numbers)
    first, rest = ir.node("Slice", [value, zero, first_row, zero]), ir.node("Slice", [value, first_row, end, zero])
    return [first, rest, ir.node("Concat", [rest.outputs[0], first.outputs[0]], {"axis": 0})]


def feature_levels(graph: ir.Graph, target: str) -> tuple[ir.Node, list[int]]:
    """Return the node that outputs the DeepStack levels, and the indices of its inputs that are levels.

    Raises:
        InapplicableError: the checkpoint has no DeepStack.
    """
    runtime = GRAPHS[target]
    name = runtime.features if runtime.packed else "deepstack_features"
    node = next((value.producer() for value in graph.outputs if value.name == name), None)
    packed = node is not None and node.op_type == "Concat"
    if node is None or (runtime.packed and not packed):
        raise InapplicableError("the checkpoint has no DeepStack")
    if runtime.packed:
        return node, list(range(1, len(node.inputs)))
    # A single level is not concatenated.
    return node, list(range(len(node.inputs))) if packed else [0]


def zero_rows_from(graph: ir.Graph, value: ir.Value, start: ir.Value) -> list[ir.Node]:
    """Return nodes that set the rows from `start` (int64 [1]) on to 0."""
    numbers = (0, np.iinfo(np.int64).max)
    zero, end = (constant(graph, f"from_{n}", np.array([n], np.int64)) for n in numbers)
    kept = ir.node("Slice", [value, zero, start, zero])
    lost = ir.node("Slice", [value, start, end, zero])
    blank = ir.node("Mul", [lost.outputs[0], constant(graph, "nothing", np.float32(0))])
    return [kept, lost, blank, ir.node("Concat", [kept.outputs[0], blank.outputs[0]], {"axis": 0})]


def steps(document: Any, kind: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the attributes of the steps in vision_processor.json that have all the keys of `kind`."""
    attributes = [transform["operation"].get("attrs", {}) for transform in document["processor"]["transforms"]]
    return [step for step in attributes if all(key in step for key in kind)]
