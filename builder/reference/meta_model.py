"""Build transformers' Qwen3-VL without weights, but with real rotary frequencies."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from builder.checkpoint.load import Checkpoint
from builder.util.errors import CheckpointError


def recompute_frequencies(model: Any) -> None:
    """Recompute the rotary frequencies, which neither checkpoint nor meta device has, with upstream's modules."""
    text, visual = model.model.language_model, model.model.visual
    text.rotary_emb = type(text.rotary_emb)(config=model.config.text_config)
    visual.rotary_pos_emb = type(visual.rotary_pos_emb)(model.config.vision_config)


def empty_model(checkpoint: Checkpoint) -> Any:
    """Return upstream's model in fp32, its parameters allocated but not written.

    Raises:
        CheckpointError: transformers rejects the config.
    """
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    try:
        config = Qwen3VLConfig.from_dict(deepcopy(dict(checkpoint.config)))
        config._attn_implementation = "eager"
        with torch.device("meta"):
            kind: Any = Qwen3VLForConditionalGeneration
            model = kind._from_config(config, dtype=torch.float32)
    # Upstream reads fields that builder/checkpoint/config.py does not validate, such as an activation's name.
    except Exception as error:
        raise CheckpointError(
            f"transformers rejects the config.json of {checkpoint.folder}",
            expected="a config that transformers builds a model from",
            found=f"{type(error).__name__}: {error}",
        ) from error
    model = model.to_empty(device="cpu").eval()
    if checkpoint.text.tied:
        model.lm_head.weight = model.model.language_model.embed_tokens.weight
    recompute_frequencies(model)
    return model
