"""Fold constants, merge equal nodes and remove unused nodes; bound weights are neither read nor folded."""

from __future__ import annotations

from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants

from builder.graph.binding import BoundGraph, unbound
from builder.graph.passes.result import PassResult


def simplify(graph: BoundGraph) -> PassResult:
    """Simplify the graph as traced; `matches` counts the nodes removed."""
    model = graph.model
    before = len(model.graph)
    for name in graph.bindings:
        model.graph.initializers[name].const_value = None  # hidden from constant folding
    fold_constants(model, onnx_shape_inference=True)
    for step in (
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    ):
        step(model)
    live = {name: binding for name, binding in graph.bindings.items() if name in model.graph.initializers}
    for name, binding in live.items():
        model.graph.initializers[name].const_value = unbound(binding)
    return PassResult(BoundGraph(model, live), before - len(model.graph))
