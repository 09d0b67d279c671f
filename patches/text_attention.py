"""Projections, norms, rotation and the equivalence check that eager and fused text attention share.

Both replace `Qwen3VLTextAttention.forward` and take the cache as the keyword `kv`: a (key, value) pair per layer, each
[batch, kv_heads, past, head_dim]. They replace the layer's pair with the extended pair.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patches.registry import Patch, applied
from patches.tiny import assert_close, tiny_model

MODELING = "transformers.models.qwen3_vl.modeling_qwen3_vl"
TARGET = f"{MODELING}:Qwen3VLTextAttention.forward"
# builder/graph/modules.py mirrors the decoder's loop over layers, so the digest covers its sources too.
COVERS = (
    f"{MODELING}:apply_rotary_pos_emb",
    f"{MODELING}:eager_attention_forward",
    f"{MODELING}:Qwen3VLTextDecoderLayer.forward",
    f"{MODELING}:Qwen3VLTextModel.forward",
    f"{MODELING}:Qwen3VLTextModel._deepstack_process",
)


def normed(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return query [batch, seq, heads, head_dim] and key [batch, seq, kv_heads, head_dim], normalized, not rotated."""
    split = (*hidden.shape[:-1], -1, self.head_dim)
    return self.q_norm(self.q_proj(hidden).view(split)), self.k_norm(self.k_proj(hidden).view(split))


def rotated(self: Any, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return query [batch, seq, heads, head_dim] and key, both rotated, and value [batch, seq, kv_heads, head_dim]."""
    query, key = normed(self, hidden)
    value = self.v_proj(hidden).view(*hidden.shape[:-1], -1, self.head_dim)
    cos, sin = (x.unsqueeze(2) for x in position_embeddings)  # (batch, seq, 1, head_dim)
    return rotate(query, cos, sin), rotate(key, cos, sin), value


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x * cos + rotate_half(x) * sin over the last axis (RoFormer, half-split layout)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def causal_bias(attention_mask: Tensor, seq: int, dtype: torch.dtype) -> Tensor:
    """Return [batch, 1, seq, total]: 0 where query i sees key j (j <= past + i, mask[j] = 1), elsewhere the minimum."""
    total = attention_mask.shape[1]
    keys = torch.arange(total, device=attention_mask.device)
    queries = torch.arange(seq, device=attention_mask.device) + (total - seq)
    allowed = (keys[None] <= queries[:, None])[None] & attention_mask[:, None].to(torch.bool)
    return torch.where(allowed, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


def fused_mask(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return `seqlens_k` [batch] int32, the number of valid keys minus one, and the total length, an int32 scalar."""
    lengths = attention_mask.sum(1, dtype=torch.int32)
    return lengths - 1, torch.ones_like(attention_mask[0], dtype=torch.int32).sum(dtype=torch.int32)


@torch.no_grad()
def check_text_attention(patch: Patch, fused: bool) -> None:
    """Compare prefill, decode and a chunk after a past with upstream's eager attention, for each layer."""
    model = tiny_model().model.language_model
    for batch, past, seq in ((1, 0, 9), (2, 0, 5), (1, 9, 1), (2, 6, 4)):
        generator = torch.Generator().manual_seed(past + seq)
        hidden = torch.randn(batch, past + seq, 48, generator=generator)
        positions = torch.arange(past + seq).expand(3, batch, -1) * torch.tensor([1, 2, 3])[:, None, None]
        cos, sin = model.rotary_emb(hidden, positions)
        mask = torch.ones(batch, past + seq, dtype=torch.int64)
        for layer in model.layers:
            want, _ = layer.self_attn(
                hidden,
                position_embeddings=(cos, sin),
                attention_mask=causal_bias(mask, past + seq, hidden.dtype),
            )
            kv = [(hidden.new_zeros(batch, 2, 0, 16),) * 2] * len(model.layers)
            parts = []
            with applied([patch]):
                for begin, end in ((0, past), (past, past + seq)) if past else ((0, seq),):
                    seen, step = mask[:, :end], slice(begin, end)
                    parts.append(
                        layer.self_attn(
                            hidden[:, step],
                            position_embeddings=(cos[:, step], sin[:, step]),
                            attention_mask=fused_mask(seen) if fused else causal_bias(seen, end - begin, hidden.dtype),
                            kv=kv,
                        )[0]
                    )
            assert_close(f"{patch.name} past {past} seq {seq}", torch.cat(parts, 1), want)
