"""Fold constants, merge equal nodes, drop what nothing reads, and strip the exporter's metadata.

In: a graph as traced. Out: the same function of its inputs, with shape arithmetic folded and no source paths in it.
Guaranteed: bound initializers are hidden from the folder, so no weight is read or folded away.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants

from builder.graph import BoundGraph, unbound
from builder.passes.outcome import Outcome


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
    strip_metadata(model)
    return Outcome(BoundGraph(model, live), before - len(model.graph))


def strip_metadata(model: ir.Model) -> None:
    """The exporter notes absolute source paths on every node: the bytes would differ by folder."""
    model.metadata_props.clear()
    model.doc_string = model.producer_version = None
    for graph in (model.graph, *model.graph.subgraphs()):
        graph.doc_string = None
        graph.metadata_props.clear()
        for node in graph:
            node.doc_string = None
            node.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)):
            value.doc_string = None
            value.metadata_props.clear()
