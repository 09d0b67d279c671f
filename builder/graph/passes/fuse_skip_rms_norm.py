"""Add, then SimplifiedLayerNormalization → com.microsoft::SkipSimplifiedLayerNormalization, which outputs both."""

from __future__ import annotations

import onnx_ir as ir

from builder.graph.binding import BoundGraph
from builder.graph.passes.result import PassResult


def fuse_skip_rms_norm(graph: BoundGraph) -> PassResult:
    """Fuse pairs of Add and norm. The sum stays readable: it is the operator's fourth output."""
    model = graph.model
    matches, misses = 0, []
    for norm in [node for node in model.graph if node.op_type == "SimplifiedLayerNormalization"]:
        summed = norm.inputs[0]
        assert summed is not None
        add = summed.producer()
        if add is None or add.op_type != "Add":
            misses.append(f"{norm.name}: its input is not a sum")
            continue
        if not _adds_alike(add, summed):
            misses.append(f"{norm.name}: the sum broadcasts, or is not [batch, seq, hidden]")
            continue
        skip = ir.node(
            "SkipSimplifiedLayerNormalization",
            inputs=[*add.inputs, norm.inputs[1]],
            attributes={"epsilon": norm.attributes.get_float("epsilon", 1e-6)},
            domain="com.microsoft",
            num_outputs=4,
            name=f"{norm.name}_skip",
        )
        for new, old in ((skip.outputs[0], norm.outputs[0]), (skip.outputs[3], summed)):
            new.shape, new.type, new.name = old.shape, old.type, old.name
        model.graph.insert_before(add, skip)
        norm.outputs[0].replace_all_uses_with(skip.outputs[0])
        summed.replace_all_uses_with(skip.outputs[3])
        model.graph.remove([norm, add], safe=True)
        matches += 1
    if matches:
        model.graph.opset_imports.setdefault("com.microsoft", 1)
    return PassResult(graph, matches, tuple(misses))


def _adds_alike(add: ir.Node, summed: ir.Value) -> bool:
    """Whether both inputs are known to be [batch, seq, hidden]: unnamed axes may differ, and broadcast."""
    shape = summed.shape
    if shape is None or len(shape) != 3 or shape.has_unknown_dim():
        return False
    return all(value is not None and value.shape == shape for value in add.inputs)
