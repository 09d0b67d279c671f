"""Read the architecture of the decoder and the vision encoder from `config.json`.

Guarantees: an accepted config is a dense Qwen3-VL whose numbers are consistent. Defaults are those of transformers'
`configuration_qwen3_vl.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, isqrt
from typing import Any

from builder.util.errors import CheckpointError, UnsupportedError

MODEL_TYPE = "qwen3_vl"
MODEL_CLASS = "Qwen3VLForConditionalGeneration"
# Larger counts are refused before the expected weights are listed.
MOST_ELEMENTS, MOST_LAYERS, MOST_NUMBER = 2**31 - 1, 1000, 1e30
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
# Optional parameters of RoPE, and those that each type requires (transformers' `modeling_rope_utils.py`).
ROPE_OPTIONAL = (
    "rope_theta",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True)
class Text:
    """Architecture of the decoder: sizes in elements, `max_position` in tokens."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    rms_eps: float
    rope_type: str
    max_position: int
    tied: bool
    attention_bias: bool


@dataclass(frozen=True)
class Vision:
    """Architecture of the vision encoder: patch sizes in pixels (or frames), `deepstack` as layer indexes."""

    depth: int
    hidden: int
    heads: int
    intermediate: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    in_channels: int
    positions: int
    out_hidden: int
    deepstack: tuple[int, ...]


def read_architecture(config: Mapping[str, Any]) -> tuple[Text, Vision]:
    """Read and check the architecture.

    Raises:
        UnsupportedError: another model type, a mixture of experts, a quantized checkpoint, or a RoPE type whose
            frequencies depend on the input.
        CheckpointError: a value that is missing, of the wrong type, or contradicts another.
    """
    _refuse_other_kinds(config)
    text = _read_text(_section(config, "text_config"), config.get("tie_word_embeddings", False))
    vision = _read_vision(_section(config, "vision_config"))
    _check_together(text, vision)
    return text, vision


def token_id(config: Mapping[str, Any], key: str, default: int, vocab: int) -> int:
    """Return the id of a special token.

    Raises:
        CheckpointError: not a row of the embedding matrix.
    """
    value = _count(config, key, default, least=0)
    if value >= vocab:
        raise CheckpointError(f"config.json: {key} is not a token", expected=f"an id below {vocab}", found=value)
    return value


def _refuse_other_kinds(config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    sections = [config, *(part for part in config.values() if isinstance(part, dict))]
    experts = next((key for part in sections for key in part if key.startswith(("num_experts", "moe_"))), None)
    if model_type == f"{MODEL_TYPE}_moe" or experts:
        raise UnsupportedError(
            "a mixture-of-experts checkpoint (qwen3_vl_moe) cannot be exported",
            expected=f"a dense {MODEL_TYPE}",
            found=experts or model_type,
        )
    if model_type != MODEL_TYPE:
        raise UnsupportedError(f"model type {model_type!r} cannot be exported", expected=MODEL_TYPE, found=model_type)
    architectures = config.get("architectures") or [MODEL_CLASS]
    if not isinstance(architectures, list) or MODEL_CLASS not in architectures:
        raise UnsupportedError(
            "config.json names another head", expected=f"architectures: {MODEL_CLASS}", found=architectures
        )
    for part in sections:
        for key in ("quantization_config", "compression_config"):
            if part.get(key) is not None:
                raise UnsupportedError(
                    f"a quantized checkpoint ({key} in config.json) cannot be exported",
                    expected="BF16, F16 or F32 weights",
                    found=_quantizer(part[key]),
                    next="build from the checkpoint that it was quantized from",
                )


def _quantizer(value: Any) -> Any:
    return value.get("quant_method", value) if isinstance(value, dict) else value


def _read_text(section: Mapping[str, Any], tied: Any) -> Text:
    heads = _count(section, "num_attention_heads", 32)
    grouped = section.get("num_key_value_heads", 32) is not None
    text = Text(
        hidden=_count(section, "hidden_size", 4096),
        layers=_count(section, "num_hidden_layers", 32, most=MOST_LAYERS),
        heads=heads,
        kv_heads=_count(section, "num_key_value_heads", 32) if grouped else heads,
        head_dim=_count(section, "head_dim", 128),
        intermediate=_count(section, "intermediate_size", 22016),
        vocab=_count(section, "vocab_size", 151936),
        rms_eps=_number(section, "rms_norm_eps", 1e-6),
        rope_type=_rope_type(section),
        max_position=_count(section, "max_position_embeddings", 128000),
        tied=_flag("tie_word_embeddings", tied),
        attention_bias=_flag("attention_bias", section.get("attention_bias", False)),
    )
    _demand(
        text.heads % text.kv_heads == 0,
        "heads are not a multiple of kv heads",
        "num_attention_heads",
        text.heads,
    )
    _demand(text.head_dim % 2 == 0, "the rotary embedding needs an even head_dim", "head_dim", text.head_dim)
    sections = _rope(section).get("mrope_section", [24, 20, 20])
    _demand(
        isinstance(sections, list)
        and len(sections) == 3
        and all(type(part) is int and part > 0 for part in sections)
        and sum(sections) == text.head_dim // 2,
        f"mrope_section must be three numbers that add up to head_dim / 2 = {text.head_dim // 2}",
        "mrope_section",
        sections,
    )
    return text


def _rope(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the RoPE parameters; as in transformers, `rope_scaling` of version 4 takes precedence."""
    rope = section.get("rope_scaling") or section.get("rope_parameters") or {}
    _demand(isinstance(rope, dict), "the rope parameters are not an object", "rope_parameters", rope)
    return rope


def _rope_type(section: Mapping[str, Any]) -> str:
    rope = _rope(section)
    if any(isinstance(value, dict) for value in rope.values()):
        raise UnsupportedError("rope parameters by layer type cannot be exported", found=", ".join(rope))
    name = rope.get("rope_type", rope.get("type", "default"))
    if name not in ROPE_TYPES:
        raise UnsupportedError(
            f"rope type {name!r} cannot be exported: only types with fixed frequencies can",
            expected=", ".join(ROPE_TYPES),
            found=name,
        )
    for key in ROPE_NUMBERS[name]:
        _number(rope, key, None)
    for part, key in ((part, key) for part in (rope, section) for key in ROPE_OPTIONAL):
        if part.get(key) is not None:
            _number(part, key, None)
    partial = rope.get("partial_rotary_factor", section.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UnsupportedError("a partial rotary embedding cannot be exported", expected="1.0", found=partial)
    return str(name)


def _read_vision(section: Mapping[str, Any]) -> Vision:
    deepstack = section.get("deepstack_visual_indexes", (8, 16, 24))
    vision = Vision(
        depth=_count(section, "depth", 27, most=MOST_LAYERS),
        hidden=_count(section, "hidden_size", 1152),
        heads=_count(section, "num_heads", 16),
        intermediate=_count(section, "intermediate_size", 4304),
        patch_size=_count(section, "patch_size", 16),
        temporal_patch_size=_count(section, "temporal_patch_size", 2),
        merge_size=_count(section, "spatial_merge_size", 2),
        in_channels=_count(section, "in_channels", 3),
        positions=_count(section, "num_position_embeddings", 2304),
        out_hidden=_count(section, "out_hidden_size", 3584),
        deepstack=tuple(deepstack) if isinstance(deepstack, (list, tuple)) else (-1,),
    )
    _demand(
        all(type(index) is int and 0 <= index < vision.depth for index in vision.deepstack)
        and len(set(vision.deepstack)) == len(vision.deepstack),
        f"deepstack_visual_indexes must be distinct vision layers, 0 to {vision.depth - 1}",
        "deepstack_visual_indexes",
        deepstack,
    )
    _demand(
        vision.hidden % vision.heads == 0,
        "hidden_size is not a multiple of num_heads",
        "hidden_size",
        vision.hidden,
    )
    head_dim = vision.hidden // vision.heads
    _demand(head_dim % 4 == 0, "the axial rotary embedding needs a head size divisible by 4", "head size", head_dim)
    side = isqrt(vision.positions)
    _demand(
        side * side == vision.positions,
        "positions must be a square",
        "num_position_embeddings",
        vision.positions,
    )
    rope = section.get("rope_parameters") or {}
    kind = rope.get("rope_type", "axial") if isinstance(rope, dict) else rope
    if kind not in ("axial", "default"):
        raise UnsupportedError(f"vision rope type {kind!r} cannot be exported", expected="axial", found=kind)
    return vision


def _check_together(text: Text, vision: Vision) -> None:
    _demand(
        vision.out_hidden == text.hidden,
        f"the vision features must be as wide as the text's hidden_size, {text.hidden}",
        "out_hidden_size",
        vision.out_hidden,
    )
    _demand(
        len(vision.deepstack) <= text.layers,
        f"more DeepStack features than the decoder's {text.layers} layers",
        "deepstack_visual_indexes",
        list(vision.deepstack),
    )


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = config.get(key)
    _demand(isinstance(section, dict), f"no {key}", key, section)
    return section  # type: ignore[return-value]


def _count(section: Mapping[str, Any], key: str, default: int, *, least: int = 1, most: int = MOST_ELEMENTS) -> int:
    value = section.get(key, default)
    if type(value) is not int or not least <= value <= most:
        raise CheckpointError(
            f"config.json: {key} is not a count", expected=f"an integer from {least} to {most}", found=value
        )
    return value


def _number(section: Mapping[str, Any], key: str, default: float | None) -> float:
    value = section.get(key, default)
    # An integer can be larger than any float.
    if type(value) not in (int, float) or not 0 < value <= MOST_NUMBER or not isfinite(value):
        raise CheckpointError(
            f"config.json: {key} is not a positive number", expected=f"a number up to {MOST_NUMBER:g}", found=value
        )
    return float(value)


def _flag(key: str, value: Any) -> bool:
    if type(value) is not bool:
        raise CheckpointError(f"config.json: {key} is neither true nor false", expected="true or false", found=value)
    return value


def _demand(condition: bool, what: str, key: str, found: Any) -> None:
    if not condition:
        raise CheckpointError(f"config.json contradicts itself: {what}", found=f"{key} = {found}")
