"""Text attention in standard operators with a concatenated cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patches.registry import Patch
from patches.text_attention import COVERS, TARGET, check_text_attention, rotated


def _make(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor,
        *,
        kv: list[tuple[Tensor, Tensor]],
        **_: Any,
    ) -> tuple[Tensor, None]:
        query, key, value = (x.transpose(1, 2) for x in rotated(self, hidden_states, position_embeddings))
        past_key, past_value = kv[self.layer_idx]
        key, value = torch.cat((past_key, key), dim=2), torch.cat((past_value, value), dim=2)
        kv[self.layer_idx] = (key, value)
        # Queries are grouped so that the cache need not be repeated: (batch, kv_heads, group, seq, head_dim)
        batch, heads, seq, head_dim = query.shape
        grouped = query.view(batch, key.shape[1], heads // key.shape[1], seq, head_dim)
        scores = torch.matmul(grouped, key[:, :, None].transpose(-1, -2)) * self.scaling
        weights = F.softmax(scores + attention_mask[:, :, None], dim=-1, dtype=torch.float32).to(query.dtype)
        out = torch.matmul(weights, value[:, :, None]).flatten(1, 2).transpose(1, 2)
        return self.o_proj(out.flatten(2)), None

    return forward


def check() -> None:
    """Compare with upstream's eager attention, to the last bits of fp32."""
    check_text_attention(PATCH, fused=False)


PATCH = Patch(
    name="text_attention_eager",
    target=TARGET,
    why="upstream's cache object and attention dispatch do not export as explicit past and present ports",
    remove_when="upstream attention takes and returns key and value tensors",
    covers=COVERS,
    make=_make,
    check=check,
)
