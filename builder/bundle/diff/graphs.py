"""In: two graphs. Out: what differs in operators, opsets, ports, and initializers' shapes and types: a `GraphChange`.

Guaranteed: no weight is read; operators of subgraphs count; the order of nodes and their names do not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from onnx import GraphProto, ModelProto, TensorProto

from builder.graph.introspection import dtype, every_graph, operator, opsets, ports

_UNNAMED = re.compile(r"constant_\d+")
Pair = tuple[Any, Any]  # (in the one, in the other); None where it is not there


@dataclass(frozen=True)
class GraphChange:
    """What differs between two graphs; each name → what it is in the one and in the other.

    Args:
        opsets: domain → version.
        operators: operator → how many.
        ports: `inputs: name` → type and axes; where only their order differs, `inputs` → names.
        initializers: name → type and shape.
        constants: how many unnamed ones the other graph lacks; None where they are the same.
        other: what else the file says, of which no more is told: names of nodes, edges, attributes.
    """

    opsets: Mapping[str, Pair]
    operators: Mapping[str, Pair]
    ports: Mapping[str, Pair]
    initializers: Mapping[str, Pair]
    constants: Pair | None
    other: bool

    @property
    def any(self) -> bool:
        named = self.opsets or self.operators or self.ports or self.initializers
        return bool(named or self.constants or self.other)


def compare_graphs(one: ModelProto, other: ModelProto) -> GraphChange:
    """What differs; external data is not looked at, nor where it lies."""
    return GraphChange(
        opsets=differing(opsets(one), opsets(other)),
        operators=differing(_operators(one), _operators(other)),
        ports=differing(_ports(one.graph), _ports(other.graph)),
        initializers=differing(*(_described(model) for model in (one, other))),
        constants=_apart(_constants(one), _constants(other)),
        other=_skeleton(one) != _skeleton(other),
    )


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Pair]:
    """Keys whose values are not equal, sorted."""
    pairs = {key: (one.get(key), other.get(key)) for key in sorted({*one, *other})}
    return {key: (a, b) for key, (a, b) in pairs.items() if a != b or type(a) is not type(b)}


def initializers(model: ModelProto) -> dict[str, TensorProto]:
    """By name; those of subgraphs too, and none that only has a number: see `builder.stages.optimize`."""
    return {tensor.name: tensor for tensor in _tensors(model.graph) if not _UNNAMED.fullmatch(tensor.name)}


def _constants(model: ModelProto) -> Counter[bytes]:
    """What has a number for a name is told apart by its value."""
    found: Counter[bytes] = Counter()
    for tensor in _tensors(model.graph):
        if _UNNAMED.fullmatch(tensor.name):
            bare = TensorProto()
            bare.CopyFrom(tensor)
            bare.ClearField("name")
            found[bare.SerializeToString(deterministic=True)] += 1
    return found


def _apart(one: Counter[bytes], other: Counter[bytes]) -> Pair | None:
    return ((one - other).total(), (other - one).total()) if one != other else None


def _operators(model: ModelProto) -> Counter[str]:
    return Counter(operator(node) for graph in every_graph(model.graph) for node in graph.node)


def _described(model: ModelProto) -> dict[str, str]:
    found = initializers(model)
    return {name: f"{dtype(one.data_type)} {list(one.dims)}" for name, one in found.items()}


def _ports(graph: GraphProto) -> dict[str, str]:
    found: dict[str, str] = {}
    for side in ("inputs", "outputs"):
        listed = ports(graph, side)
        found |= {f"{side}: {port['name']}": f"{port['dtype']} {port['shape']}" for port in listed}
        found[side] = ", ".join(port["name"] for port in listed)
    return found


def _skeleton(model: ModelProto) -> bytes:
    """The file but for its named weights, and for who wrote it."""
    bare = ModelProto()
    bare.CopyFrom(model)
    for tensor in initializers(bare).values():
        for field in ("raw_data", "external_data", "float_data", "int32_data", "int64_data", "double_data"):
            tensor.ClearField(field)
        tensor.ClearField("data_location")
    for field in ("producer_name", "producer_version", "doc_string"):
        bare.ClearField(field)
    return bytes(bare.SerializeToString(deterministic=True))


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    for one in every_graph(graph):
        yield from one.initializer
