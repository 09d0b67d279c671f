"""Target `genai`: stock onnxruntime-genai ≥ 0.18, model type `qwen3_vl`, DeepStack packed into the hidden axis.

The runtime allocates `image_features` and `inputs_embeds` with `model.decoder.hidden_size` as their last size, so that
(1 + D)·H goes through it unchanged. `logits` declares a literal 1: with an axis name there the runtime preallocates
[batch, seq, vocab] and fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builder.checkpoint import Checkpoint
from builder.contract import CONTRIB, DECODER, EMBEDDINGS, VISION, components, packed_width
from builder.providers import session_options
from builder.recipe import Recipe, Target
from builder.rules import resolve
from builder.targets.runtime import Runtime
from builder.targets.settings import as_json, eos_token_ids, pipeline_settings, text_config, vision_processor
from builder.weight_names import EMBEDDINGS as EMBEDDING_MATRIX

SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")


def _passes(graph: str, fused: bool) -> tuple[str, ...]:
    if graph == VISION:
        return ("simplify", f"lower_segment_attention_{'fused' if fused else 'eager'}")
    if graph == EMBEDDINGS:
        return ("simplify",)
    return ("simplify", "gemm_head", "fold_weight_transposes", "fuse_rms_norm", "fuse_skip_rms_norm")


def _module(checkpoint: Checkpoint, model: Any, graph: str, fused: bool) -> Any:
    from builder import modules

    if graph == VISION:
        return modules.VisionEncoder(model, packed=True)
    if graph == EMBEDDINGS:
        return modules.PackedEmbeddings(model, checkpoint.image_token_id)
    return modules.TextDecoder(model, len(checkpoint.vision.deepstack), packed=True, fused=fused)


def _configs(checkpoint: Checkpoint, recipe: Recipe, target: Target) -> Mapping[str, str]:
    return {
        "genai_config.json": as_json(genai_config(checkpoint, recipe, target.attention == "fused")),
        "vision_processor.json": vision_processor(checkpoint),
        "pipeline.json": pipeline_settings(checkpoint, recipe.max_length),
    }


def genai_config(checkpoint: Checkpoint, recipe: Recipe, fused: bool) -> dict[str, Any]:
    """genai_config.json. `max_length` is bounded by the checkpoint's context; an eager decoder shares no buffer."""
    text, vision = checkpoint.text, checkpoint.vision
    graphs = {component.name: component for component in components(checkpoint, "genai")}
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
        # The runtime masks every padding token that a prompt holds, and checkpoints pad with tokens that prompts may
        # hold (<|endoftext|>, or <|im_end|>, which ends each turn). No prompt holds the video token: there is no video.
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
        # The runtime appends to one buffer only through GroupQueryAttention.
        "past_present_share_buffer": fused,
    }


RUNTIME = Runtime(
    name="genai",
    opset=18,
    domains=frozenset({"", CONTRIB}),
    module=_module,
    passes=_passes,
    configs=_configs,
)
