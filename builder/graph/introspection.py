"""List a graph's ports, operators, opsets and tensors, subgraphs included, without reading external data."""

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
    """Turn exceptions from a malformed graph into an error that names its file.

    Protobuf accepts names that are not UTF-8, types that do not exist, and more.

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
    """The graph's `"inputs"` or `"outputs"` as in a manifest: name, dtype, shape."""
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
    """The sorted operators of the model and its subgraphs: `domain::Type`, or `Type` for standard operators."""
    return sorted({operator(node) for graph in every_graph(model.graph) for node in graph.node})


def opsets(model: ModelProto) -> dict[str, int]:
    """Imported domain → version."""
    return {"" if opset.domain in ONNX else opset.domain: opset.version for opset in model.opset_import}


def every_graph(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and its subgraphs."""
    waiting = [graph]
    while waiting:
        current = waiting.pop()
        yield current
        for attribute in (attribute for node in current.node for attribute in node.attribute):
            waiting += [attribute.g] if attribute.HasField("g") else []
            waiting += attribute.graphs


def tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Initializers and constants, those of subgraphs included."""
    for inner in every_graph(graph):
        yield from inner.initializer
        for sparse in inner.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for attribute in (attribute for node in inner.node for attribute in node.attribute):
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)


def operator(node: NodeProto) -> str:
    """`domain::Type`, or `Type` for standard operators."""
    return node.op_type if node.domain in ONNX else f"{node.domain}::{node.op_type}"


def dtype(kind: int) -> str:
    """numpy's name of an ONNX data type, such as `float32`."""
    try:
        return ir.DataType(kind).numpy().name
    except (ValueError, TypeError):  # not a tensor, or a type of a later ONNX
        return f"type {kind}"
