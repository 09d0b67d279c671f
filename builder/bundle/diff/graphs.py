"""Compare two graphs: operators, opsets, ports, and shapes and types of initializers.

No weight is read. Subgraphs count; the order of nodes and their names do not.
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
Pair = tuple[Any, Any]  # (first, second); None where absent


@dataclass(frozen=True)
class GraphChange:
    """Differences between two graphs; each maps a name to a pair.

    Args:
        opsets: domain → version.
        operators: operator → count.
        ports: `inputs: name` → type and axes; where only the order differs, `inputs` → names.
        initializers: name → type and shape.
        constants: number of unnamed constants that are not in the other graph; None where they are equal.
        other: whether anything else differs: names of nodes, edges, attributes.
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


def compare_graphs(first: ModelProto, second: ModelProto) -> GraphChange:
    """Compare two graphs, ignoring external data and its location."""
    return GraphChange(
        opsets=differing(opsets(first), opsets(second)),
        operators=differing(_operators(first), _operators(second)),
        ports=differing(_ports(first.graph), _ports(second.graph)),
        initializers=differing(*(_described(model) for model in (first, second))),
        constants=_unshared(_constants(first), _constants(second)),
        other=_skeleton(first) != _skeleton(second),
    )


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Pair]:
    """Return the keys whose values differ, sorted, with both values."""
    pairs = {key: (first.get(key), second.get(key)) for key in sorted({*first, *second})}
    return {key: (a, b) for key, (a, b) in pairs.items() if a != b or type(a) is not type(b)}


def initializers(model: ModelProto) -> dict[str, TensorProto]:
    """Map names to initializers, of subgraphs too, without numbered constants (see `builder.stages.optimize`)."""
    return {tensor.name: tensor for tensor in _tensors(model.graph) if not _UNNAMED.fullmatch(tensor.name)}


def _constants(model: ModelProto) -> Counter[bytes]:
    """Count the numbered constants by value, as their names carry no meaning."""
    found: Counter[bytes] = Counter()
    for tensor in _tensors(model.graph):
        if _UNNAMED.fullmatch(tensor.name):
            bare = TensorProto()
            bare.CopyFrom(tensor)
            bare.ClearField("name")
            found[bare.SerializeToString(deterministic=True)] += 1
    return found


def _unshared(first: Counter[bytes], second: Counter[bytes]) -> Pair | None:
    return ((first - second).total(), (second - first).total()) if first != second else None


def _operators(model: ModelProto) -> Counter[str]:
    return Counter(operator(node) for graph in every_graph(model.graph) for node in graph.node)


def _described(model: ModelProto) -> dict[str, str]:
    return {name: f"{dtype(tensor.data_type)} {list(tensor.dims)}" for name, tensor in initializers(model).items()}


def _ports(graph: GraphProto) -> dict[str, str]:
    found: dict[str, str] = {}
    for side in ("inputs", "outputs"):
        listed = ports(graph, side)
        found |= {f"{side}: {port['name']}": f"{port['dtype']} {port['shape']}" for port in listed}
        found[side] = ", ".join(port["name"] for port in listed)
    return found


def _skeleton(model: ModelProto) -> bytes:
    """Serialize the graph without the data of its named weights and without its producer."""
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
    for subgraph in every_graph(graph):
        yield from subgraph.initializer
