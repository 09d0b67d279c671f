"""Target `genai`: stock onnxruntime-genai ≥ 0.18, model type `qwen3_vl`, DeepStack packed into the hidden axis.

The runtime allocates `image_features` and `inputs_embeds` with `model.decoder.hidden_size` as their last dimension, so
(1 + D)·H passes through it unchanged. `logits` declares a literal 1 for seq: with an axis name, the runtime would
preallocate [batch, seq, vocab] and fail.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from builder.checkpoint.load import Checkpoint
from builder.checkpoint.parts import DECODER, EMBEDDINGS, VISION
from builder.checkpoint.tensors import EMBEDDINGS as EMBEDDING_MATRIX
from builder.graph.ports import packed_components, packed_width
from builder.quantization.rules import resolve
from builder.targets.config_files import as_json, eos_token_ids, pipeline_settings, text_config, vision_processor
from builder.targets.providers import session_options
from builder.targets.spec import Packaging

if TYPE_CHECKING:
    from builder.targets.recipe import Recipe, Target

SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")


def _configs(checkpoint: Checkpoint, recipe: Recipe, target: Target) -> Mapping[str, str]:
    return {
        "genai_config.json": as_json(genai_config(checkpoint, recipe, target.attention == "fused")),
        "vision_processor.json": vision_processor(checkpoint),
        "pipeline.json": pipeline_settings(checkpoint, recipe.max_length),
    }


def genai_config(checkpoint: Checkpoint, recipe: Recipe, fused: bool) -> dict[str, Any]:
    """Return genai_config.json; `max_length` is limited to the checkpoint's context."""
    text, vision = checkpoint.text, checkpoint.vision
    graphs = {component.name: component for component in packed_components(checkpoint)}
    names = {name: {port.name: port.name for port in graph.inputs} for name, graph in graphs.items()}
    session = session_options(recipe.provider)
    quantized = EMBEDDING_MATRIX in resolve(recipe.rules, checkpoint.tensors)
    decoder = {
        "session_options": session,
        "filename": graphs[DECODER].file,
        "head_size": text.head_dim,
        "hidden_size": packed_width(checkpoint),
        "inputs": {
            "inputs_embeds": "inputs_embeds",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": text.heads,
        "num_hidden_layers": text.layers,
        "num_key_value_heads": text.kv_heads,
    }
    model = {
        "type": "qwen3_vl",
        "context_length": text.max_position,
        "vocab_size": text.vocab,
        **_tokens(checkpoint),
        "decoder": decoder,
        "embedding": {
            "filename": graphs[EMBEDDINGS].file,
            "inputs": names[EMBEDDINGS],
            "outputs": {"inputs_embeds": "inputs_embeds"},
            "session_options": session_options(recipe.provider, lookup=quantized),
        },
        "vision": {
            "filename": graphs[VISION].file,
            "config_filename": "vision_processor.json",
            "spatial_merge_size": vision.merge_size,
            "patch_size": vision.patch_size,
            "inputs": names[VISION],
            "outputs": {"image_features": "image_features"},
            "session_options": session,
        },
    }
    return {"model": model, "search": _search(checkpoint, recipe.max_length, fused)}


def _tokens(checkpoint: Checkpoint) -> dict[str, Any]:
    eos = eos_token_ids(checkpoint)
    generation, text = checkpoint.generation, text_config(checkpoint)
    bos = [value for value in (generation.get("bos_token_id"), text.get("bos_token_id")) if value is not None]
    return {
        "bos_token_id": int([*bos, *eos][0]),
        "eos_token_id": eos,
        # The runtime masks every padding token in a prompt, and checkpoints pad with tokens that prompts may contain
        # (<|endoftext|>, or <|im_end|>, which ends each turn). Without videos, no prompt contains the video token.
        "pad_token_id": checkpoint.video_token_id,
        "image_token_id": checkpoint.image_token_id,
        "video_token_id": checkpoint.video_token_id,
        "vision_start_token_id": checkpoint.vision_start_token_id,
    }


def _search(checkpoint: Checkpoint, max_length: int, fused: bool) -> dict[str, Any]:
    sampling = {key: checkpoint.generation[key] for key in SAMPLING if checkpoint.generation.get(key) is not None}
    return {
        "do_sample": bool(checkpoint.generation.get("do_sample", False)),
        "max_length": min(max_length, checkpoint.text.max_position),
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        **sampling,
        # The runtime can append to a shared buffer only with GroupQueryAttention.
        "past_present_share_buffer": fused,
    }


PACKAGING = Packaging(configs=_configs, provider=True)
