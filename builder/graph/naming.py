"""Names of nodes, intermediate values and operators."""

from __future__ import annotations

import onnx_ir as ir

from builder.graph.binding import BoundGraph
from builder.graph.ports import RESIDUAL


def rename(bound: BoundGraph) -> None:
    """Number nodes, values and constants, and drop symbolic axes that are expressions: both depend on traced sizes.

    Ports, bound initializers and `residual.N` keep their names.
    """
    graph = bound.model.graph
    ports = {value.name for value in (*graph.inputs, *graph.outputs)}
    read = (value for node in graph.all_nodes() for value in node.inputs if value is not None)
    constants = {
        id(v): v for v in read if v.is_initializer() and v.name not in bound.bindings and "." not in str(v.name)
    }
    for number, value in enumerate(constants.values()):
        value.name = f"constant_{number}"
    for number, node in enumerate(graph.all_nodes()):
        node.name = f"{node.op_type}_{number}"
        for index, value in enumerate(node.outputs):
            if value.name not in ports and not str(value.name).startswith(f"{RESIDUAL}."):
                value.name = f"{node.name}.{index}" if index else node.name
            if value.shape is not None:
                value.shape = ir.Shape(
                    [dim if str(dim).isidentifier() or isinstance(dim, int) else None for dim in value.shape]
                )


def operator(node: ir.Node) -> str:
    """`domain::Type`, or `Type` for standard operators."""
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type
