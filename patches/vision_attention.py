"""Vision attention over segments (one frame of one image each), for any number of images of any sizes.

`cu_seqlens` carries the [2, patches] ranges that patches/vision_forward.py computes, instead of offsets.
The recipe's `attention` decides how builder/graph/passes/lower_segment_attention.py lowers the operator:
in blocks of query rows with standard operators, or as one MultiHeadAttention per segment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from patches.operators import segment_attention
from patches.registry import Patch, applied
from patches.text_attention import MODELING, rotate
from patches.tiny import assert_close, tiny_model

TARGET = f"{MODELING}:Qwen3VLVisionAttention.forward"
COVERS = (f"{MODELING}:apply_rotary_pos_emb_vision", f"{MODELING}:eager_attention_forward")
WHY = "upstream splits by lengths.tolist(), a Python loop whose length depends on the images"


def _make(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        self: Any,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        **_: Any,
    ) -> Tensor:
        patches = hidden_states.shape[0]
        qkv = self.qkv(hidden_states).view(patches, 3, self.num_heads, -1)  # (patches, 3, heads, head_dim)
        cos, sin = (x.unsqueeze(1) for x in position_embeddings)
        query, key = rotate(qkv[:, 0], cos, sin), rotate(qkv[:, 1], cos, sin)
        query, key, value = (x.flatten(1) for x in (query, key, qkv[:, 2]))
        out = segment_attention(query, key, value, cu_seqlens[0], cu_seqlens[1], self.num_heads, self.scaling)
        projected: Tensor = self.proj(out)
        return projected

    return forward


def check() -> None:
    """Compare with upstream's eager attention."""
    check_vision_attention(PATCH)


@torch.no_grad()
def check_vision_attention(patch: Patch) -> None:
    """Compare `patch` with upstream's eager attention, which loops over segments in Python."""
    attention = tiny_model().model.visual.blocks[0].attn
    for lengths in ((16,), (4, 12), (8, 8, 4)):
        ends = torch.tensor(lengths).cumsum(0)
        total = int(ends[-1])
        generator = torch.Generator().manual_seed(total)
        hidden = torch.randn(total, 32, generator=generator)
        angles = torch.randn(total, 8, generator=generator).repeat(1, 2)
        offsets = torch.cat((torch.zeros(1, dtype=torch.int32), ends.to(torch.int32)))
        segment = (torch.arange(total)[:, None] >= ends[None]).sum(1)
        ranges = torch.stack((offsets[:-1].long()[segment], ends[segment]))
        rotary = (angles.cos(), angles.sin())
        want = attention(hidden, cu_seqlens=offsets, position_embeddings=rotary)
        with applied([patch]):
            got = attention(hidden, cu_seqlens=ranges, position_embeddings=rotary)
        assert_close(f"{patch.name} over {lengths}", got, want)


PATCH = Patch(
    name="vision_attention",
    target=TARGET,
    why=WHY,
    remove_when="upstream's segment attention exports with any number of segments",
    covers=COVERS,
    make=_make,
    check=check,
)
