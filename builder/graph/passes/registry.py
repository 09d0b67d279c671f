"""The graph passes by name; a pass takes a `BoundGraph`, returns a `PassResult` and reads no weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from builder.graph.binding import BoundGraph
from builder.graph.passes.fold_weight_transposes import fold_weight_transposes
from builder.graph.passes.fuse_rms_norm import fuse_rms_norm
from builder.graph.passes.fuse_skip_rms_norm import fuse_skip_rms_norm
from builder.graph.passes.gemm_head import gemm_head
from builder.graph.passes.lower_segment_attention import lower_segment_attention
from builder.graph.passes.result import PassResult
from builder.graph.passes.simplify import simplify

PASSES: dict[str, Callable[[BoundGraph], PassResult]] = {
    "simplify": simplify,
    "fold_weight_transposes": fold_weight_transposes,
    "gemm_head": gemm_head,
    "fuse_rms_norm": fuse_rms_norm,
    "fuse_skip_rms_norm": fuse_skip_rms_norm,
    "lower_segment_attention_eager": partial(lower_segment_attention, fused=False),
    "lower_segment_attention_fused": partial(lower_segment_attention, fused=True),
}
