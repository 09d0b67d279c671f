"""Move the transposition of a bound weight from the graph into its binding.

A bias-free linear layer is traced as MatMul(x, Transpose(weight)). ONNX Runtime would fold the Transpose at load, into
a second copy of the weight in memory.
"""

from __future__ import annotations

import onnx_ir as ir

from builder.graph.binding import BoundGraph, unbound
from builder.graph.passes.result import PassResult


def fold_weight_transposes(graph: BoundGraph) -> PassResult:
    """Fold Transpose nodes of bound weights; a weight that is also read untransposed is a miss."""
    model, bindings = graph.model, dict(graph.bindings)
    matches, misses = 0, []
    for node in [node for node in model.graph if node.op_type == "Transpose"]:
        weight = node.inputs[0]
        if weight is None or weight.name not in bindings:
            continue
        if list(node.attributes.get_ints("perm", [1, 0])) != [1, 0] or len(weight.uses()) != 1:
            misses.append(f"{weight.name}: not a plain transposition, or also read elsewhere")
            continue
        binding = bindings[weight.name].with_axes_swapped()
        bindings[weight.name] = binding
        weight.const_value = unbound(binding)
        weight.shape = ir.Shape(binding.stored_shape)
        node.outputs[0].replace_all_uses_with(weight)
        model.graph.remove(node, safe=True)
        matches += 1
    return PassResult(BoundGraph(model, bindings), matches, tuple(misses))
