"""A tiny Qwen3-VL with seeded random weights, for the equivalence checks of the patches."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

TOLERANCE = 2e-6  # of the output's standard deviation: a few units in the last place of fp32


def tiny_model(rope: dict[str, Any] | None = None, seed: int = 0) -> Any:
    """Return upstream's model in fp32 on the CPU with eager attention, so that both sides compute it the same way.

    It has 3 text and 3 vision layers, with DeepStack after vision layers 0 and 1. Equal seeds give equal models.

    Args:
        rope: RoPE parameters, over the default type.
    """
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
    """Check that max |got - want| / std(want) is within the tolerance.

    Raises:
        AssertionError: shapes differ, or the difference exceeds the tolerance.
    """
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error = float((got - want).abs().max() / want.std().clamp(min=1e-30))
    assert error <= tolerance, (
        f"{name}: differs by {error:.1e} of a standard deviation, at most {tolerance:.0e} allowed"
    )
