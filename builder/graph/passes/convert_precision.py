"""Convert a fp32 graph to fp16 or bf16: every value that depends on a float port or a weight.

Guarantees: pixel values, and ports and layers that are given, stay fp32, with casts around them; so do positions,
angles and interpolation weights, which depend on integers alone; norms accumulate in fp32, as their operators do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx_ir as ir

from builder.graph.binding import BoundGraph, unbound
from builder.graph.passes.result import PassResult
from builder.graph.ports import RESIDUAL

TYPES = {
    "fp16": (ir.DataType.FLOAT16, "float16", np.float16),
    "bf16": (ir.DataType.BFLOAT16, "bfloat16", ml_dtypes.bfloat16),
}
FLOAT = ir.DataType.FLOAT
PIXELS = "pixel_values"  # always fp32, as clients' preprocessing gives it


def convert_precision(
    graph: BoundGraph, precision: str, wide_layers: Collection[int] = (), wide_ports: Collection[str] = ()
) -> PassResult:
    """Convert the graph; `matches` counts the nodes that compute on 16-bit values.

    Args:
        graph: in fp32.
        precision: "fp16" or "bf16".
        wide_layers: layers that stay fp32; layer N is what computes `residual.N`.
        wide_ports: further inputs and outputs that stay fp32.
    """
    return _Conversion(graph, precision, frozenset(wide_layers), frozenset({PIXELS, *wide_ports})).run()


class _Conversion:
    def __init__(
        self, graph: BoundGraph, precision: str, wide_layers: frozenset[int], wide_ports: frozenset[str]
    ) -> None:
        self.model, self.bindings = graph.model, dict(graph.bindings)
        self.type, self.name, self.numpy = TYPES[precision]
        self.wide, self.wide_ports = wide_layers, wide_ports
        self.casts: dict[tuple[int, ir.DataType], ir.Value] = {}

    def run(self) -> PassResult:
        graph = self.model.graph
        converted, wide_nodes = self._split_nodes()
        for name, binding in list(self.bindings.items()):
            if binding.dtype == "float32":
                self.bindings[name] = replace(binding, dtype=self.name)
                value = graph.initializers[name]
                value.const_value = unbound(self.bindings[name])
                value.type = ir.TensorType(self.type)
        for value in graph.inputs:
            if value.name not in self.wide_ports:
                self._retype(value)
        for node in list(graph):
            if node in converted:
                self._convert(node)
            elif node in wide_nodes:
                self._widen(node)
        for index, value in enumerate(graph.outputs):
            # An output that depends on integers alone, or that a wide layer computes, is fp32 so far.
            dtype, wanted = value.dtype, FLOAT if value.name in self.wide_ports else self.type
            if dtype is not None and dtype in (FLOAT, self.type) and dtype != wanted:
                port = self._as(value, wanted)
                port.name, value.name = value.name, f"{value.name}.{dtype.name.lower()}"
                graph.outputs[index] = port
        return PassResult(BoundGraph(self.model, self.bindings), len(converted))

    def _split_nodes(self) -> tuple[set[ir.Node], set[ir.Node]]:
        """The nodes to convert, and those of wide layers; nodes that depend on integers alone are in neither."""
        flowing = {id(value) for value in self.model.graph.inputs if value.dtype == FLOAT}
        flowing |= {id(self.model.graph.initializers[name]) for name in self.bindings}
        converted: set[ir.Node] = set()
        wide_nodes: set[ir.Node] = set()
        for node, layer in _with_layers(self.model.graph):
            reads = [*node.inputs, *_captured(node)]
            if any(value is not None and id(value) in flowing for value in reads):
                floats = [value for value in node.outputs if value.dtype in (FLOAT, None)]
                if node.op_type in ("Shape", "Size") or not floats:
                    continue
                flowing |= {id(value) for value in floats}
                # Attention is converted even there: its cache is a port, and its inputs are normalized.
                wide = layer in self.wide and node.op_type != "GroupQueryAttention"
                (wide_nodes if wide else converted).add(node)
        return converted, wide_nodes

    def _convert(self, node: ir.Node) -> None:
        for index, value in enumerate(node.inputs):
            if value is not None and _type(value) == FLOAT:
                node.replace_input_with(index, self._as(value, self.type))
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                self._body(attribute.as_graph())
        if node.op_type == "Cast" and node.attributes.get_int("to", 0) == FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(self.type))
        for value in node.outputs:
            self._retype(value)

    def _widen(self, node: ir.Node) -> None:
        """Cast the inputs of a node that stays fp32; its outputs are cast back where converted nodes read them."""
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == self.type:
                node.replace_input_with(index, self._as(value, FLOAT))

    def _body(self, body: ir.Graph) -> None:
        for value in body.inputs:
            self._retype(value)
        for node in body:
            for index, read in enumerate(node.inputs):
                if read is not None and _type(read) == FLOAT and read.graph is not body:
                    node.replace_input_with(index, self._as(read, self.type))
            if node.op_type == "Constant":
                self._constant(node)
            for value in node.outputs:
                self._retype(value)

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value cast to another type, once. Constants are cast too: the runtime folds the cast, at no loss."""
        key = (id(value), dtype)
        if key not in self.casts:
            cast = ir.node("Cast", [value], attributes={"to": int(dtype)})
            new = cast.outputs[0]
            new.shape, new.type = value.shape, ir.TensorType(dtype)
            new.name = f"{dtype.name.lower()}.{value.name}"  # a prefix, as names that start with `residual.` are taken
            producer = value.producer()
            if producer is not None and producer.graph is self.model.graph:
                self.model.graph.insert_after(producer, cast)
            else:
                self.model.graph.insert_before(self.model.graph[0], cast)
            self.casts[key] = new
        return self.casts[key]

    def _constant(self, node: ir.Node) -> None:
        tensor = node.attributes.get_tensor("value", None)
        if tensor is not None and tensor.dtype == FLOAT:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().astype(self.numpy)))

    def _retype(self, value: ir.Value) -> None:
        if value.dtype == FLOAT:
            value.type = ir.TensorType(self.type)


def _type(value: ir.Value) -> ir.DataType | None:
    """The type of a value, that of an untyped constant included."""
    constant = None if value.dtype else ir.convenience.get_const_tensor(value)
    return constant.dtype if constant is not None else value.dtype


def _with_layers(graph: ir.Graph) -> Iterator[tuple[ir.Node, int]]:
    """Each node with its layer: layer N ends with the node that computes `residual.N`."""
    layer = 0
    for node in graph:
        yield node, layer
        streams = [value for value in node.outputs if str(value.name).startswith(f"{RESIDUAL}.")]
        if streams:
            layer = int(str(streams[0].name).rpartition(".")[2]) + 1


def _captured(node: ir.Node) -> Iterable[ir.Value | None]:
    """The values that the node's subgraphs read from outside."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            body = attribute.as_graph()
            for inner in body:
                yield from (value for value in inner.inputs if value is not None and value.graph is not body)
