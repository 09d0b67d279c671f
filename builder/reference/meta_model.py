"""What an upstream model that was built on the meta device still lacks.

In: transformers' Qwen3-VL without weights. Out: the same with its rotary frequencies.
Guaranteed: computed by upstream's own modules from the model's own config.
"""

from __future__ import annotations

from typing import Any


def recompute_frequencies(model: Any) -> None:
    """No checkpoint has the rotary frequencies, and those made on the meta device are none."""
    text, visual = model.model.language_model, model.model.visual
    text.rotary_emb = type(text.rotary_emb)(config=model.config.text_config)
    visual.rotary_pos_emb = type(visual.rotary_pos_emb)(model.config.vision_config)
