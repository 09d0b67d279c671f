"""Text attention as `com.microsoft::RotaryEmbedding` and `::GroupQueryAttention`, which appends in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from patches.operators import group_query_attention, rotary_embedding
from patches.registry import Patch
from patches.text_attention import COVERS, TARGET, check_text_attention, normed


def _make(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: tuple[Tensor, Tensor],
        *,
        kv: list[tuple[Tensor, Tensor]],
        **_: Any,
    ) -> tuple[Tensor, None]:
        query, key = (x.flatten(2) for x in normed(self, hidden_states))
        batch, seq = hidden_states.shape[:2]
        # The operator looks table rows up by one position per token; as a token has three, it gets a row of its own.
        tables = [x[..., : self.head_dim // 2].reshape(batch * seq, -1) for x in position_embeddings]
        rows = torch.arange(batch * seq, device=hidden_states.device).view(batch, seq)
        query, key = (rotary_embedding(x, rows, *tables) for x in (query, key))
        out, *present = group_query_attention(
            query,
            key,
            self.v_proj(hidden_states),
            past=kv[self.layer_idx],
            lengths=attention_mask,
            heads=self.config.num_attention_heads,
            scale=self.scaling,
        )
        kv[self.layer_idx] = (present[0], present[1])
        return self.o_proj(out), None

    return forward


def check() -> None:
    """Compare the operator's definition with upstream's eager attention, to the last bits of fp32."""
    check_text_attention(PATCH, fused=True)


PATCH = Patch(
    name="text_attention_fused",
    target=TARGET,
    why="eager attention copies the whole cache each step; the contrib operator appends in place",
    remove_when="upstream attention exports to one operator that shares the cache buffer",
    covers=COVERS,
    make=_make,
    check=check,
)
