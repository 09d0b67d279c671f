"""Vision attention as in patches/vision_attention.py, with rotation as `com.microsoft::RotaryEmbedding`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from patches.operators import rotary_embedding, segment_attention
from patches.registry import Patch
from patches.vision_attention import COVERS, TARGET, WHY, check_vision_attention


def _make(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        self: Any,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        **_: Any,
    ) -> Tensor:
        query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)  # (patches, hidden)
        patches = hidden_states.shape[0]
        # One table row per patch; the second half of a row repeats the first.
        tables = [x.chunk(2, dim=-1)[0] for x in position_embeddings]
        rows = torch.arange(patches, device=hidden_states.device)[None]
        query, key = (rotary_embedding(x[None], rows, *tables)[0] for x in (query, key))
        out = segment_attention(query, key, value, cu_seqlens[0], cu_seqlens[1], self.num_heads, self.scaling)
        projected: Tensor = self.proj(out)
        return projected

    return forward


def check() -> None:
    """Compare the operator's definition with upstream's eager attention."""
    check_vision_attention(PATCH)


PATCH = Patch(
    name="vision_attention_fused",
    target=TARGET,
    why=WHY,
    remove_when="upstream's segment attention exports with any number of segments, its rotation as one operator",
    covers=COVERS,
    make=_make,
    check=check,
)
