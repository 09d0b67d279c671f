"""A tiny random Qwen3-VL, seeded, for the equivalence checks of the patches.

Out: upstream modules in fp32 on the CPU, with SDPA off so that both sides compute attention the same way.
Guaranteed: no weights are read; the same seed gives the same model.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

TOLERANCE = 2e-6  # of the output's standard deviation: a few units in the last place of fp32


def tiny_model(rope: dict[str, Any] | None = None, seed: int = 0) -> Any:
    """`Qwen3VLForConditionalGeneration`, 3 text and 3 vision layers, DeepStack after 0 and 1."""
    torch.manual_seed(seed)
    section = {"mrope_interleaved": True, "mrope_section": [4, 2, 2]}
    text = {
        "vocab_size": 128,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **(rope or {}), **section},
    }
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 48,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=120,
        video_token_id=121,
        vision_start_token_id=122,
        vision_end_token_id=123,
    )
    kind: Any = Qwen3VLForConditionalGeneration
    model = kind._from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (0.5 / max(parameter.shape[-1], 4) ** 0.5) + (
            1.0 if parameter.ndim == 1 else 0.0
        )
    return model


def assert_close(name: str, got: torch.Tensor, want: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Raises AssertionError with the figure when max |got - want| / std(want) exceeds the tolerance."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error = float((got - want).abs().max() / want.std().clamp(min=1e-30))
    assert error <= tolerance, f"{name}: {error:.1e} of a standard deviation off, allowed {tolerance:.0e}"
