"""Operators of the patched modules: in PyTorch they compute what upstream computes, in an ONNX export each is one node.

`com.microsoft::GroupQueryAttention` and `::RotaryEmbedding` stay in the graph;
builder/graph/passes/lower_segment_attention.py lowers `qwen3vl::SegmentAttention` for the target, and
builder/graph/unroll.py removes `qwen3vl::Layer`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SEGMENT_ATTENTION, LAYER = "qwen3vl::SegmentAttention", "qwen3vl::Layer"


def layer_mark(hidden: Tensor) -> Tensor:
    """Return `hidden` unchanged; mark where a layer ends, or the first begins, for builder/graph/unroll.py."""
    if not torch.onnx.is_in_onnx_export():
        return hidden
    mark: Tensor = torch.onnx.ops.symbolic(LAYER, (hidden,), {}, dtype=hidden.dtype, shape=hidden.shape, version=1)
    return mark


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_begin: Tensor,
    segment_end: Tensor,
    heads: int,
    scale: float,
) -> Tensor:
    """Compute unmasked attention of each patch to the patches of its own segment (one frame of one image).

    Args:
        query, key, value: [patches, hidden], float, already normalized and rotated.
        segment_begin, segment_end: [patches] int64, the half-open range of a patch's segment.
        heads: number of heads that `hidden` is split into.
        scale: factor of the scores.

    Returns:
        [patches, hidden], the dtype of `query`.
    """
    inputs = (query, key, value, segment_begin, segment_end)
    if torch.onnx.is_in_onnx_export():
        attributes: dict[str, Any] = {"num_heads": heads, "scale": scale}
        node: Tensor = torch.onnx.ops.symbolic(
            SEGMENT_ATTENTION, inputs, attributes, dtype=query.dtype, shape=query.shape, version=1
        )
        return node
    patches, hidden = query.shape
    split = [x.reshape(patches, heads, hidden // heads).transpose(0, 1) for x in (query, key, value)]
    out = torch.empty_like(query)
    start = 0
    while start < patches:
        begin, end = int(segment_begin[start]), int(segment_end[start])
        q, k, v = (x[:, begin:end] for x in split)  # (heads, segment, head_dim)
        weights = F.softmax(torch.matmul(q, k.transpose(1, 2)) * scale, dim=-1, dtype=torch.float32).to(q.dtype)
        out[begin:end] = torch.matmul(weights, v).transpose(0, 1).reshape(end - begin, hidden)
        start = end
    return out


def rotary_embedding(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head in the half-split layout (RoFormer), as ONNX Runtime's contrib operator defines it.

    Args:
        x: [batch, seq, heads * head_dim].
        positions: [batch, seq] int64, rows of the tables.
        cos, sin: [rows, head_dim / 2].

    Returns:
        [batch, seq, heads * head_dim].
    """
    if torch.onnx.is_in_onnx_export():
        node: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::RotaryEmbedding", (x, positions, cos, sin), {}, dtype=x.dtype, shape=x.shape, version=1
        )
        return node
    first, second = x.view(*x.shape[:2], -1, 2, cos.shape[-1]).unbind(-2)  # (batch, seq, heads, head_dim / 2)
    c, s = (table[positions].unsqueeze(2) for table in (cos, sin))
    return torch.stack((first * c - second * s, second * c + first * s), dim=-2).flatten(2)


def group_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: tuple[Tensor, Tensor],
    lengths: tuple[Tensor, Tensor],
    heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute causal grouped-query attention with a cache, as ONNX Runtime's contrib operator defines it.

    Args:
        query: [batch, seq, heads * head_dim], already normalized and rotated, as is `key`.
        key, value: [batch, seq, kv_heads * head_dim].
        past: key and value, each [batch, kv_heads, past, head_dim].
        lengths: `seqlens_k` [batch] int32, the number of valid keys of each row minus one, and the total length
            past + seq, an int32 scalar.

    Returns:
        output [batch, seq, heads * head_dim]; present key and value [batch, kv_heads, past + seq, head_dim].
    """
    batch, seq, _ = query.shape
    _, kv_heads, past_length, head_dim = past[0].shape
    if torch.onnx.is_in_onnx_export():
        present = (batch, kv_heads, past_length + seq, head_dim)
        output, *grown = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (query, key, value, *past, *lengths),
            {"num_heads": heads, "kv_num_heads": kv_heads, "scale": scale},
            dtypes=(query.dtype,) * 3,
            shapes=(query.shape, present, present),
            version=1,
        )
        return output, grown[0], grown[1]
    q = query.reshape(batch, seq, kv_heads, heads // kv_heads, head_dim).permute(0, 2, 3, 1, 4)
    keys, values = (
        torch.cat([old, new.reshape(batch, seq, kv_heads, head_dim).transpose(1, 2)], dim=2)
        for old, new in zip(past, (key, value), strict=True)
    )
    total = keys.shape[2]
    causal = torch.arange(total)[None] <= torch.arange(total - seq, total)[:, None]  # (seq, total)
    valid = torch.arange(total)[None] <= lengths[0][:, None]  # (batch, total)
    scores = torch.matmul(q, keys[:, :, None].transpose(-1, -2)) * scale
    scores = scores.masked_fill(~(causal[None] & valid[:, None])[:, None, None], torch.finfo(scores.dtype).min)
    out = torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), values[:, :, None])
    return out.permute(0, 3, 1, 2, 4).reshape(batch, seq, heads * head_dim), keys, values
