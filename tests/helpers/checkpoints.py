"""Write random Qwen3-VL checkpoints, laid out as by `save_pretrained`. No torch.

The same arguments give the same bytes. Weights are scaled so that the argmax varies, and so that DeepStack, images and
positions each change the answer.
"""

from __future__ import annotations

import json
import lzma
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from builder.checkpoint.config import read_architecture
from builder.checkpoint.tensors import EMBEDDINGS, LM_HEAD, expected_tensors

MINIATURE = Path(__file__).parents[2] / "builder" / "miniature" / "checkpoint"
QWEN3_TOKENIZER = Path(__file__).parents[1] / "data" / "qwen3-tokenizer"
DTYPES: Mapping[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
}
VISION = {
    "depth": 4,
    "hidden_size": 48,
    "num_heads": 4,
    "intermediate_size": 80,
    "num_position_embeddings": 144,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TOKEN_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
# A random model must not answer with a special or unknown token: the rows of these matrices from the first special
# token on are scaled down.
SPECIAL_ROWS = frozenset({EMBEDDINGS, LM_HEAD})
SPECIAL_SCALE = 0.1

# The shapes of all parity tests: arguments of `write_checkpoint`.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "untied": {
        "seed": 11,
        "tied": False,
        "dtype": "float32",
        "shards": 2,
        "deepstack": (0, 2),
        "rope": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    },
    "deepstack0": {
        "seed": 12,
        "dtype": "float16",
        "deepstack": (),
        "text": {
            "num_hidden_layers": 3,
            "hidden_size": 80,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
        },
        "vision": {"depth": 2, "num_heads": 3, "num_position_embeddings": 64},
        "rope": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 2.0},
    },
    "patch14merge3": {
        "seed": 13,
        "deepstack": (2, 0, 3),
        "text": {"num_key_value_heads": 4, "hidden_size": 96, "attention_bias": False},
        "vision": {"patch_size": 14, "spatial_merge_size": 3, "hidden_size": 32, "num_heads": 2, "depth": 5},
        "rope": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
    },
    "qwen3": {
        "seed": 14,
        "tokenizer": "qwen3",
        "deepstack": (1, 2, 3),
        "text": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "rope_theta": 5000000},
        "rope": {"rope_type": "default"},
        "legacy": True,
    },
    "biased": {
        "seed": 15,
        "shards": 3,
        "deepstack": (1,),
        "text": {"attention_bias": True, "num_hidden_layers": 3},
    },
}


def write_shape(folder: Path, shape: str) -> Path:
    """Write `SHAPES[shape]` to `folder`."""
    return write_checkpoint(folder, **SHAPES[shape])


def write_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    text: Mapping[str, Any] = TEXT,
    vision: Mapping[str, Any] = VISION,
    tied: bool = True,
    deepstack: tuple[int, ...] = (1, 2, 3),
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    shards: int = 1,
    rope: Mapping[str, Any] = ROPE,
    tokenizer: Literal["mini", "qwen3"] = "mini",
    legacy: bool = False,
) -> Path:
    """Write a checkpoint to the new folder `folder`.

    Args:
        folder: must not exist yet.
        text: what differs from `TEXT` in `text_config`.
        vision: what differs from `VISION` in `vision_config`.
        tied: whether the head is the embedding matrix.
        deepstack: `deepstack_visual_indexes`.
        dtype: of every weight.
        shards: number of safetensors files; several have an index.
        rope: the rope parameters; `mrope_section` is added to fit the head size.
        tokenizer: the miniature's, or the real one with its 151,936 embeddings.
        legacy: rope parameters and dtype under the names of transformers 4.
    """
    shapes, first_special = write_settings(
        folder,
        text=text,
        vision=vision,
        tied=tied,
        deepstack=deepstack,
        dtype=dtype,
        rope=rope,
        tokenizer=tokenizer,
        legacy=legacy,
    )
    rng = np.random.default_rng(seed)
    tensors = {name: _draw(name, shape, rng) for name, shape in shapes.items()}
    for name in SPECIAL_ROWS & set(tensors):
        tensors[name][first_special:] *= np.float32(SPECIAL_SCALE)
    _write_weights(folder, {name: tensor.astype(DTYPES[dtype]) for name, tensor in tensors.items()}, shards)
    return folder


def write_settings(
    folder: Path,
    *,
    text: Mapping[str, Any] = TEXT,
    vision: Mapping[str, Any] = VISION,
    tied: bool = True,
    deepstack: tuple[int, ...] = (1, 2, 3),
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    rope: Mapping[str, Any] = ROPE,
    tokenizer: Literal["mini", "qwen3"] = "mini",
    legacy: bool = False,
) -> tuple[dict[str, tuple[int, ...]], int]:
    """Write everything of `write_checkpoint`, with the same arguments, but the weights.

    Returns:
        name → shape of every weight that is missing, and the first special token's id (see `SPECIAL_ROWS`).
    """
    folder.mkdir(parents=True)
    tokens = _write_tokenizer(folder, tokenizer)
    config = _config(tokens, text, vision, deepstack, rope, tied=tied, dtype=dtype, legacy=legacy)
    config["text_config"]["vocab_size"] = 151936 if tokenizer == "qwen3" else 4096
    _write_json(folder / "config.json", config)
    _write_generation(folder, tokens)
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        settings = json.loads((MINIATURE / file).read_text())
        settings["patch_size"] = config["vision_config"]["patch_size"]
        settings["merge_size"] = config["vision_config"]["spatial_merge_size"]
        settings["temporal_patch_size"] = config["vision_config"]["temporal_patch_size"]
        _write_json(folder / file, settings)
    return expected_tensors(config, *read_architecture(config)), min(tokens.values())


def spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return mean and standard deviation of a weight's values."""
    if name.endswith(".bias"):
        return 0.0, 0.05
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        # Attention that is sharp enough for positions to matter, and not so sharp, where heads are wide and layers
        # many, that each layer multiplies the rounding of the one before.
        return 1.8 * (32 / shape[0]) ** 0.25, 0.1
    if "norm" in name:
        return 1.0, 0.1
    if name.endswith("embed_tokens.weight"):
        # Small compared with what the layers add; otherwise the likeliest next token would be the last token.
        return 0.0, 0.15
    if name.endswith("pos_embed.weight"):
        return 0.0, 0.5
    # The many tokens of an image would outweigh the last token, and hide the difference between two steps.
    gain = 0.6 if name.endswith("o_proj.weight") else 1.0
    return 0.0, gain / math.sqrt(math.prod(shape[1:]))


def _config(
    tokens: Mapping[str, int],
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    deepstack: tuple[int, ...],
    rope: Mapping[str, Any],
    *,
    tied: bool,
    dtype: str,
    legacy: bool,
) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((MINIATURE / "config.json").read_text())
    text_config, vision_config = config["text_config"], config["vision_config"]
    text_config |= {**TEXT, **text, "tie_word_embeddings": tied}
    text_config |= {"bos_token_id": tokens["<|endoftext|>"], "eos_token_id": tokens["<|im_end|>"]}
    half = text_config["head_dim"] // 2
    side = half * 20 // 64  # as [24, 20, 20] is to a head of 128
    rope = {"mrope_section": [half - 2 * side, side, side], "mrope_interleaved": True, **rope}
    text_config["rope_scaling" if legacy else "rope_parameters"] = rope
    vision_config |= {**VISION, **vision, "out_hidden_size": text_config["hidden_size"]}
    vision_config["deepstack_visual_indexes"] = list(deepstack)
    if legacy:
        del text_config["rope_parameters"], vision_config["rope_parameters"], config["dtype"]
        text_config["dtype"] = dtype
    else:
        config["dtype"] = dtype
    config["tie_word_embeddings"] = tied
    return config | {key: tokens[content] for key, content in TOKEN_IDS.items()}


def _write_tokenizer(folder: Path, tokenizer: str) -> dict[str, int]:
    """Write the tokenizer's files; return the ids of its special tokens."""
    settings = json.loads((MINIATURE / "tokenizer_config.json").read_text())
    if tokenizer == "qwen3":
        content = lzma.decompress((QWEN3_TOKENIZER / "tokenizer.json.xz").read_bytes())
        (folder / "tokenizer.json").write_bytes(content)
        real = json.loads((QWEN3_TOKENIZER / "tokenizer_config.json").read_text())
        # The package's template is for a text-only model.
        settings = real | {key: settings[key] for key in ("chat_template", "processor_class")}
    else:
        shutil.copyfile(MINIATURE / "tokenizer.json", folder / "tokenizer.json")
    _write_json(folder / "tokenizer_config.json", settings)
    shutil.copyfile(MINIATURE / "chat_template.jinja", folder / "chat_template.jinja")
    return {token["content"]: int(index) for index, token in settings["added_tokens_decoder"].items()}


def _write_generation(folder: Path, tokens: Mapping[str, int]) -> None:
    end, pad = tokens["<|im_end|>"], tokens["<|endoftext|>"]
    settings = json.loads((MINIATURE / "generation_config.json").read_text())
    settings |= {"bos_token_id": pad, "eos_token_id": [end, pad], "pad_token_id": pad}
    _write_json(folder / "generation_config.json", settings)


def _write_weights(folder: Path, tensors: Mapping[str, npt.NDArray[Any]], shards: int) -> None:
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    step = math.ceil(len(names) / shards)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard * step : (shard + 1) * step]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    mean, deviation = spread(name, shape)
    noise = np.float32(deviation) * rng.standard_normal(shape, dtype=np.float32)
    return noise + np.float32(mean) if mean else noise  # adding 0 would change -0 to +0, and thus the bytes


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
