"""Build the full model's graph from a trace of a model that has one layer of each kind.

The traced graph marks the end of each layer with a `LAYER` node; in the result, the residual stream after layer N is
named `residual.N`. Guarantees: the result equals a trace of the full model; a layer that reads anything but the
residual stream from another layer is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import onnx_ir as ir

from builder.checkpoint.load import Checkpoint
from builder.graph.binding import Binding, BoundGraph, unbound
from builder.graph.ports import RESIDUAL, Component, Port
from builder.util.errors import PassError

OWN, LAYER = "qwen3vl", "Layer"  # patches/operators.py: a mark before the first layer and after each layer
_INDEXED = re.compile(r"(?:^|(?<=\.))(layers|blocks|past_key_values|present)\.(\d+)(?=\.)")


@dataclass(frozen=True)
class LayerKinds:
    """The layers that are traced, and for each layer of the full model the index in `traced` that it copies."""

    traced: tuple[int, ...]
    copies: tuple[int, ...]

    @classmethod
    def of(cls, layers: int, deepstack: Iterable[int]) -> LayerKinds:
        """Each layer where DeepStack features leave or enter is a kind of its own; all other layers are one kind."""
        special = {index for index in deepstack if index < layers}
        plain = [index for index in range(layers) if index not in special]
        traced = tuple(sorted([*special, *plain[:1]]))
        return cls(traced, tuple(traced.index(i if i in special else plain[0]) for i in range(layers)))


def decoder_kinds(checkpoint: Checkpoint) -> LayerKinds:
    """Layer kinds of the text decoder, whose first layers take a DeepStack level each."""
    return LayerKinds.of(checkpoint.text.layers, range(len(checkpoint.vision.deepstack)))


def vision_kinds(checkpoint: Checkpoint) -> LayerKinds:
    """Layer kinds of the vision encoder."""
    return LayerKinds.of(checkpoint.vision.depth, checkpoint.vision.deepstack)


def shortened(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint configured with one layer of each kind; its tensors are still those of the full model."""
    vision, text = vision_kinds(checkpoint).traced, decoder_kinds(checkpoint).traced
    deepstack = tuple(vision.index(layer) for layer in checkpoint.vision.deepstack)
    config = {
        **checkpoint.config,
        "text_config": {**checkpoint.config["text_config"], "num_hidden_layers": len(text)},
        "vision_config": {
            **checkpoint.config["vision_config"],
            "depth": len(vision),
            "deepstack_visual_indexes": list(deepstack),
        },
    }
    return replace(
        checkpoint,
        config=config,
        text=replace(checkpoint.text, layers=len(text)),
        vision=replace(checkpoint.vision, depth=len(vision), deepstack=deepstack),
    )


def unroll(traced: BoundGraph, kinds: LayerKinds, component: Component) -> BoundGraph:
    """Build the graph with every layer of `kinds.copies` and the ports of `component`.

    Raises:
        PassError: the graph has another number of layers, or a layer reads another layer's values.
    """
    before, layers, after = _parts(traced.model, len(kinds.traced))
    copy = _Copy(traced, component)
    copy.take(before, None)
    for index, number in enumerate(kinds.copies):
        copy.take(layers[number], (before, *layers)[number][-1], index, alone=kinds.copies.count(number) == 1)
    copy.take(after, layers[-1][-1])
    return copy.bound()


def _parts(model: ir.Model, count: int) -> tuple[list[ir.Node], list[list[ir.Node]], list[ir.Node]]:
    """The nodes before the layers, those of each layer with the mark at its end, and those after the layers."""
    nodes = list(model.graph)
    marks = [position for position, node in enumerate(nodes) if node.op_type == LAYER]
    if len(marks) != count + 1:
        raise PassError(
            f"the traced {model.graph.name} is not divided into layers",
            expected=f"{count + 1} marks around {count} layers",
            found=f"{len(marks)} marks",
        )
    layers = [nodes[begin + 1 : end + 1] for begin, end in pairwise(marks)]
    return nodes[: marks[0] + 1], layers, nodes[marks[-1] + 1 :]


class _Copy:
    """The graph under construction; `own` and `shared` map traced values to the copies that are read from here on."""

    def __init__(self, traced: BoundGraph, component: Component) -> None:
        self.traced, self.component = traced, component
        self.nodes: list[ir.Node] = []
        self.bindings: dict[str, Binding] = {}
        self.initializers: dict[str, ir.Value] = {}
        self.inputs = {port.name: _port(port) for port in component.inputs}
        self.outputs: dict[str, ir.Value] = {}
        self.shared: dict[ir.Value, ir.Value] = {}
        self.own: dict[ir.Value, ir.Value] = {}
        self.stream: ir.Value | None = None

    def take(
        self, nodes: Sequence[ir.Node], entry: ir.Node | None, layer: int | None = None, alone: bool = True
    ) -> None:
        """Copy `nodes`, which read the stream at the mark `entry`; the nodes of a layer get its weights and ports.

        Values of a layer that is `alone`, the only layer of its kind, stay readable: DeepStack features are read later.
        """
        self.own = {}
        if entry is not None:
            assert self.stream is not None
            self.own[entry.outputs[0]] = self.stream
        for node in nodes:
            if node.op_type == LAYER:
                assert node.inputs[0] is not None
                self.stream = self._read(node.inputs[0], layer)
                if layer is not None:
                    self.stream.name = f"{RESIDUAL}.{layer}"
            elif node.op_type != "Constant":
                self._copy(node, layer, self.own)
                ports = [value for value in node.outputs if value.is_graph_output()]
                self.outputs |= {_at(str(value.name), layer): self.own[value] for value in ports}
        if alone:
            self.shared |= self.own

    def bound(self) -> BoundGraph:
        """The full graph, once all nodes are taken."""
        old = self.traced.model
        for port in self.component.outputs:
            value = self.outputs[port.name]
            value.name, value.shape = port.name, ir.Shape(port.shape)
        graph = ir.Graph(
            list(self.inputs.values()),
            [self.outputs[port.name] for port in self.component.outputs],
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={name: version for name, version in old.opset_imports.items() if name != OWN},
            name=self.component.name,
        )
        return BoundGraph(ir.Model(graph, ir_version=old.ir_version, producer_name=old.producer_name), self.bindings)

    def _copy(self, node: ir.Node, layer: int | None, values: dict[ir.Value, ir.Value]) -> None:
        inputs = [value if value is None else self._read(value, layer) for value in node.inputs]
        copy = ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=len(node.outputs))
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.shape, new.type = old.shape, old.type
            values[old] = new
        self.nodes.append(copy)

    def _read(self, value: ir.Value, layer: int | None) -> ir.Value:
        producer = value.producer()
        if value.is_graph_input():
            return self.inputs[_at(str(value.name), layer)]
        if value.is_initializer():
            return self._initializer(value, layer)
        if producer is not None and producer.op_type == "Constant" and value not in self.shared:
            # The exporter puts a constant into the layer that reads it first; other layers read it from there.
            self._copy(producer, None, self.shared)
        copy = self.own.get(value, self.shared.get(value))
        if copy is None:
            raise PassError(
                f"a layer of {self.component.name} reads what another layer computes",
                expected="the residual stream, and what is computed before all layers",
                found=str(value.name),
            )
        return copy

    def _initializer(self, value: ir.Value, layer: int | None) -> ir.Value:
        old, new = str(value.name), _at(str(value.name), layer)
        if new not in self.initializers:
            copy = ir.Value(name=new, shape=value.shape, type=value.type, const_value=value.const_value)
            if old in self.traced.bindings:
                known = self.traced.bindings[old]
                self.bindings[new] = replace(known, initializer=new, tensor=_at(known.tensor, layer))
                copy.const_value = unbound(self.bindings[new])
            self.initializers[new] = copy
        return self.initializers[new]


def _at(name: str, layer: int | None) -> str:
    return name if layer is None else _INDEXED.sub(rf"\g<1>.{layer}", name)


def _port(port: Port) -> ir.Value:
    kinds = {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64}
    return ir.Value(name=port.name, shape=ir.Shape(port.shape), type=ir.TensorType(kinds[port.dtype]))
