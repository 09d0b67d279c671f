"""What an upstream model that was built on the meta device still lacks.

In: transformers' Qwen3-VL without weights. Out: the same with its rotary frequencies.
Guaranteed: computed by upstream's own modules from the model's own config.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from builder.checkpoint.load import Checkpoint
from builder.util.errors import CheckpointError


def recompute_frequencies(model: Any) -> None:
    """No checkpoint has the rotary frequencies, and those made on the meta device are none."""
    text, visual = model.model.language_model, model.model.visual
    text.rotary_emb = type(text.rotary_emb)(config=model.config.text_config)
    visual.rotary_pos_emb = type(visual.rotary_pos_emb)(model.config.vision_config)


def empty_model(checkpoint: Checkpoint) -> Any:
    """Upstream's model in fp32: parameters are allocated, their pages never touched; rotary frequencies are real.

    Raises:
        CheckpointError: upstream does not take the config.
    """
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    try:
        config = Qwen3VLConfig.from_dict(deepcopy(dict(checkpoint.config)))
        config._attn_implementation = "eager"
        with torch.device("meta"):
            kind: Any = Qwen3VLForConditionalGeneration
            model = kind._from_config(config, dtype=torch.float32)
    except (
        Exception
    ) as error:  # what builder/checkpoint/config.py does not read, upstream does: an activation's name, say
        raise CheckpointError(
            f"transformers does not take the config.json of {checkpoint.folder}",
            expected="a config that it makes a model of",
            found=f"{type(error).__name__}: {error}",
        ) from error
    model = model.to_empty(device="cpu").eval()
    if checkpoint.text.tied:
        model.lm_head.weight = model.model.language_model.embed_tokens.weight
    recompute_frequencies(model)
    return model
