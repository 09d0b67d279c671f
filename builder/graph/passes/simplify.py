"""Fold constants, merge equal nodes, drop what nothing reads.

In: a graph as traced. Out: the same function of its inputs, with shape arithmetic folded.
Guaranteed: bound initializers are hidden from the folder, so no weight is read or folded away.
"""

from __future__ import annotations

from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants

from builder.graph.binding import BoundGraph, unbound
from builder.graph.passes.result import Outcome


def simplify(graph: BoundGraph) -> Outcome:
    """Counts the nodes that went away."""
    model = graph.model
    before = len(model.graph)
    for name in graph.bindings:
        model.graph.initializers[name].const_value = None
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
    return Outcome(BoundGraph(model, live), before - len(model.graph))
