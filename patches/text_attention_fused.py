"""Text attention as one `com.microsoft::GroupQueryAttention` node, which shares the runtime's cache buffer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from patches.operators import group_query_attention
from patches.registry import Patch
from patches.text_attention import COVERS, TARGET, check_text_attention, rotated


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
        query, key, value = (x.flatten(2) for x in rotated(self, hidden_states, position_embeddings))
        out, *present = group_query_attention(
            query,
            key,
            value,
            past=kv[self.layer_idx],
            lengths=attention_mask,
            heads=self.config.num_attention_heads,
            scale=self.scaling,
        )
        kv[self.layer_idx] = (present[0], present[1])
        return self.o_proj(out), None

    return forward


def check() -> None:
    """Upstream's eager attention against the operator's definition, to the last bits of fp32."""
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
