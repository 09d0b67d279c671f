"""In: a graph. Out: what can be said of it without its weights: ports, operators, opsets, tensors.

Guaranteed: graphs inside nodes are looked into; nothing is computed, no external data is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from builder.util.errors import BundleError

ONNX = ("", "ai.onnx")  # two names of one domain


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn what trips over a graph into an error that names it: protobuf lets names pass that are no text, and more.

    Raises:
        BundleError: the graph in the file `name` cannot be read.
    """
    try:
        yield
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise BundleError(
            f"{name} cannot be read", expected="an ONNX graph", found=f"{type(error).__name__}: {error}"
        ) from error


def ports(graph: GraphProto, side: str) -> list[dict[str, Any]]:
    """Of `"inputs"` or `"outputs"`, as a manifest has them: name, dtype, shape."""
    return [
        {
            "name": port.name,
            "dtype": dtype(port.type.tensor_type.elem_type),
            "shape": [
                axis.dim_value if axis.HasField("dim_value") else axis.dim_param
                for axis in port.type.tensor_type.shape.dim
            ],
        }
        for port in (graph.input if side == "inputs" else graph.output)
    ]


def operators(model: ModelProto) -> list[str]:
    """`domain::Type`, or the type alone for standard ones; those of subgraphs too; sorted."""
    return sorted({operator(node) for graph in every_graph(model.graph) for node in graph.node})


def opsets(model: ModelProto) -> dict[str, int]:
    """Domain → version, as imported."""
    return {"" if one.domain in ONNX else one.domain: one.version for one in model.opset_import}


def every_graph(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and those inside its nodes."""
    waiting = [graph]
    while waiting:
        one = waiting.pop()
        yield one
        for attribute in (attribute for node in one.node for attribute in node.attribute):
            waiting += [attribute.g] if attribute.HasField("g") else []
            waiting += attribute.graphs


def tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Initializers and constants."""
    for one in every_graph(graph):
        yield from one.initializer
        for sparse in one.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for attribute in (attribute for node in one.node for attribute in node.attribute):
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)


def operator(node: NodeProto) -> str:
    """`domain::Type`, or the type alone for standard ones."""
    return node.op_type if node.domain in ONNX else f"{node.domain}::{node.op_type}"


def dtype(kind: int) -> str:
    """The name of a tensor's type: `float32`."""
    try:
        return ir.DataType(kind).numpy().name
    except (ValueError, TypeError):  # no tensor, or one of a type that a later ONNX has
        return f"type {kind}"
