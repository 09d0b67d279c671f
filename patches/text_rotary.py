"""`Qwen3VLTextRotaryEmbedding.forward` without `dynamic_rope_update` and without in-place interleaving."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from patches.registry import Patch, applied
from patches.tiny import assert_close, tiny_model

MODELING = "transformers.models.qwen3_vl.modeling_qwen3_vl"


def frequency_axes(mrope_section: list[int], frequencies: int) -> list[int]:
    """Return the position axis (0 temporal, 1 height, 2 width) of each rotary frequency: T H W T H W … T T.

    This is Qwen3-VL's interleaved MRoPE: height has the frequencies 1, 4, 7 … below 3 * mrope_section[1], width has
    2, 5, 8 … below 3 * mrope_section[2], all others are temporal.
    """
    return [i % 3 if i % 3 and i < 3 * mrope_section[i % 3] else 0 for i in range(frequencies)]


def _make(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        # x: (batch, seq, hidden), read for its dtype only; position_ids: (3, batch, seq)
        axes = frequency_axes(list(self.mrope_section), self.inv_freq.shape[0])
        chosen = position_ids.index_select(
            0, torch.tensor(axes, device=position_ids.device)
        )  # (head_dim / 2, batch, seq)
        angles = chosen.permute(1, 2, 0).float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)  # (batch, seq, head_dim)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)

    return forward


def check() -> None:
    """Check equality with upstream for every static RoPE type."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 128
    for rope in ({}, {"rope_type": "linear", "factor": 2.0}, yarn, llama3):
        rotary = tiny_model(rope).model.language_model.rotary_emb
        for batch, seq in ((1, 1), (2, 7), (1, 33)):
            positions = torch.randint(0, 400, (3, batch, seq), generator=torch.Generator().manual_seed(seq))
            want = rotary(torch.zeros(1), positions)
            with applied([PATCH]):
                got = rotary(torch.zeros(1), positions)
            for name, a, b in zip(("cos", "sin"), got, want, strict=True):
                assert_close(f"{name} of {rope.get('rope_type', 'default')}", a, b, 0.0)


PATCH = Patch(
    name="text_rotary",
    target=f"{MODELING}:Qwen3VLTextRotaryEmbedding.forward",
    why="dynamic_rope_update recomputes frequencies from the largest position, a branch on data that the exporter "
    "cannot trace, and the interleaving writes in place",
    remove_when="upstream's forward exports with dynamic shapes and position ids [3, batch, seq]",
    covers=(
        "transformers.modeling_rope_utils:dynamic_rope_update",
        f"{MODELING}:Qwen3VLTextRotaryEmbedding.compute_default_rope_parameters",
        f"{MODELING}:Qwen3VLTextRotaryEmbedding.recomposition_frequencies",
        f"{MODELING}:Qwen3VLTextRotaryEmbedding.apply_interleaved_mrope",
    ),
    make=_make,
    check=check,
)
