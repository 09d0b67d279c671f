"""weight · x · 1/sqrt(mean(x²) + eps) → SimplifiedLayerNormalization, ONNX Runtime's RMS norm."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from builder.graph.binding import BoundGraph
from builder.graph.passes.result import PassResult


def fuse_rms_norm(graph: BoundGraph) -> PassResult:
    """Fuse RMS norms over the last axis, with any epsilon."""
    rule = pattern.RewriteRule(_norm, _fused, _over_last_axis, name="fuse_rms_norm")
    matches = pattern.RewriteRuleSet([rule]).apply_to_model(graph.model)
    left = sum(node.op_type == "ReduceMean" for node in graph.model.graph)
    return PassResult(graph, matches, ("a ReduceMean is left that is not an RMS norm over the last axis",) * left)


def _norm(op: Any, x: Any, weight: Any, two: Any, axes: Any, epsilon: Any) -> Any:
    mean = op.ReduceMean(op.Pow(x, two), axes, keepdims=1, noop_with_empty_axes=0)
    return op.Mul(weight, op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(mean, epsilon)))))


def _over_last_axis(_: Any, two: ir.Value, axes: ir.Value, epsilon: ir.Value, **rest: Any) -> bool:
    constants = [ir.convenience.get_const_tensor(value) for value in (two, axes, epsilon)]
    if any(constant is None for constant in constants):
        return False
    exponent, axis = (constant.numpy().tolist() for constant in constants[:2] if constant is not None)
    return exponent in (2, [2]) and axis in (-1, [-1])


def _fused(op: Any, x: ir.Value, weight: ir.Value, epsilon: ir.Value, **_: Any) -> Any:
    constant = ir.convenience.get_const_tensor(epsilon)
    assert constant is not None
    return op.SimplifiedLayerNormalization(x, weight, axis=-1, epsilon=float(constant.numpy().item()), stash_type=1)
