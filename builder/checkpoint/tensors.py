"""List the weights of an architecture, and check a checkpoint's tensors against them.

The weights are the parameters of transformers' `Qwen3VLForConditionalGeneration`, tied weights once. Shapes are
`(out, in)` for linear layers, `(out, channels, frames, rows, columns)` for the patch embedding.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from builder.checkpoint.config import Text, Vision
from builder.checkpoint.safetensors import Tensor, map_bytes
from builder.util.errors import CheckpointError, WeightError

LM_HEAD, EMBEDDINGS = "lm_head.weight", "model.language_model.embed_tokens.weight"
# Dtypes of config.json → the stored dtypes that convert to them without loss.
EXACT_IN = {"bfloat16": ("BF16",), "float16": ("F16",), "float32": ("F32", "BF16", "F16")}
COMPARED_BYTES = 16 * 2**20
# Comparing spellings takes time quadratic in their length: limits against hostile files.
MOST_COMPARED, LONGEST_COMPARED = 2000, 200


def expected_tensors(config: Mapping[str, Any], text: Text, vision: Vision) -> dict[str, tuple[int, ...]]:
    """Return name → shape of the weights of `Qwen3VLForConditionalGeneration(config)`."""
    shapes = {LM_HEAD: (text.vocab, text.hidden)} if not text.tied else {}
    return shapes | _text_tensors(text) | _vision_tensors(vision)


def check_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    expected: Mapping[str, tuple[int, ...]],
) -> dict[str, Tensor]:
    """Return the tensors of `expected`, in its order.

    Args:
        folder: with the files of `tensors`; read only to compare an `lm_head` that should be tied.
        tensors: all tensors of the files.
        config: `config.json`; transformers loads every weight as its `dtype`, if given.
        expected: see `expected_tensors`.

    Raises:
        WeightError: a tensor is missing or unexpected.
        CheckpointError: a shape or dtype contradicts the config, or an `lm_head` that should be tied differs.
    """
    tied = LM_HEAD not in expected and LM_HEAD in tensors
    unexpected = [name for name in tensors if name not in expected and not (tied and name == LM_HEAD)]
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise WeightError(
            f"{_listed(missing)} missing from the checkpoint",
            expected=f"{missing[0]}, shape {list(expected[missing[0]])}",
            found=nearest(missing[0], unexpected) or "nothing of that name",
            next='if the embeddings are tied, set "tie_word_embeddings": true' if missing == [LM_HEAD] else None,
        )
    if unexpected:
        first = unexpected[0]
        raise WeightError(
            f"{_listed(unexpected)} in {tensors[first].file} but not in the model of config.json",
            expected=nearest(first, expected),
            found=f"{first}, shape {list(tensors[first].shape)}",
        )
    for name, shape in expected.items():
        _check_shape(tensors[name], shape)
        _check_dtype(tensors[name], config.get("dtype") or config.get("torch_dtype"))
    if tied:
        _check_tied(folder, tensors[LM_HEAD], tensors[EMBEDDINGS])
    return {name: tensors[name] for name in expected}


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the closest spelling of `name` among `names`, or None if nothing is close."""
    if len(name) > LONGEST_COMPARED:
        return None
    comparable = [other for other in names if len(other) <= LONGEST_COMPARED][:MOST_COMPARED]
    return next(iter(difflib.get_close_matches(name, comparable, n=1)), None)


def _listed(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more tensors are" if len(names) > 1 else " is")


def _check_shape(tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.file}: the shape of {tensor.name} contradicts config.json",
            expected=list(shape),
            found=list(tensor.shape),
        )


def _check_dtype(tensor: Tensor, declared: Any) -> None:
    """Refuse a weight that loses precision in the config's dtype: transformers would compute with other values."""
    if declared is None:
        return
    if not isinstance(declared, str) or declared not in EXACT_IN:
        raise CheckpointError("config.json: unknown dtype", expected=", ".join(EXACT_IN), found=declared)
    if tensor.dtype not in EXACT_IN[declared]:
        raise CheckpointError(
            f"{tensor.file}: the dtype of {tensor.name} contradicts config.json",
            expected=f"{EXACT_IN[declared][0]} (dtype: {declared})",
            found=tensor.dtype,
            next="correct dtype in config.json, or remove it to keep the dtype of each weight",
        )


def _check_tied(folder: Path, head: Tensor, embeddings: Tensor) -> None:
    same = (head.dtype, head.shape) == (embeddings.dtype, embeddings.shape)
    left, right = map_bytes(folder, head), map_bytes(folder, embeddings)
    blocks = range(0, embeddings.nbytes, COMPARED_BYTES)
    if not same or not all((left[at : at + COMPARED_BYTES] == right[at : at + COMPARED_BYTES]).all() for at in blocks):
        raise CheckpointError(
            f"{head.file}: {LM_HEAD} differs from {EMBEDDINGS}, to which config.json ties it",
            expected="the same values, or no such tensor",
            found="different values",
            next='set "tie_word_embeddings": false in config.json if the head has weights of its own',
        )


def _text_tensors(text: Text) -> dict[str, tuple[int, ...]]:
    prefix = "model.language_model"
    wide, narrow = text.heads * text.head_dim, text.kv_heads * text.head_dim
    projections = {
        "q_proj": (wide, text.hidden),
        "k_proj": (narrow, text.hidden),
        "v_proj": (narrow, text.hidden),
        "o_proj": (text.hidden, wide),
    }
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDINGS: (text.vocab, text.hidden),
        f"{prefix}.norm.weight": (text.hidden,),
    }
    for index in range(text.layers):
        layer = f"{prefix}.layers.{index}"
        for name, shape in projections.items():
            shapes[f"{layer}.self_attn.{name}.weight"] = shape
            if text.attention_bias:
                shapes[f"{layer}.self_attn.{name}.bias"] = shape[:1]
        shapes |= {
            f"{layer}.self_attn.q_norm.weight": (text.head_dim,),
            f"{layer}.self_attn.k_norm.weight": (text.head_dim,),
            f"{layer}.input_layernorm.weight": (text.hidden,),
            f"{layer}.post_attention_layernorm.weight": (text.hidden,),
            f"{layer}.mlp.gate_proj.weight": (text.intermediate, text.hidden),
            f"{layer}.mlp.up_proj.weight": (text.intermediate, text.hidden),
            f"{layer}.mlp.down_proj.weight": (text.hidden, text.intermediate),
        }
    return shapes


def _vision_tensors(vision: Vision) -> dict[str, tuple[int, ...]]:
    prefix, hidden = "model.visual", vision.hidden
    merged = hidden * vision.merge_size**2
    kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.patch_embed.proj.weight": (hidden, *kernel),
        f"{prefix}.patch_embed.proj.bias": (hidden,),
        f"{prefix}.pos_embed.weight": (vision.positions, hidden),
    }
    for index in range(vision.depth):
        block = f"{prefix}.blocks.{index}"
        shapes |= _layer(f"{block}.norm1", (hidden,)) | _layer(f"{block}.norm2", (hidden,))
        shapes |= _layer(f"{block}.attn.qkv", (3 * hidden, hidden))
        shapes |= _layer(f"{block}.attn.proj", (hidden, hidden))
        shapes |= _layer(f"{block}.mlp.linear_fc1", (vision.intermediate, hidden))
        shapes |= _layer(f"{block}.mlp.linear_fc2", (hidden, vision.intermediate))
    # The main merger normalizes each patch, the DeepStack mergers the merged patches.
    mergers = {f"{prefix}.merger": hidden}
    mergers |= {f"{prefix}.deepstack_merger_list.{index}": merged for index in range(len(vision.deepstack))}
    for merger, normalized in mergers.items():
        shapes |= _layer(f"{merger}.norm", (normalized,))
        shapes |= _layer(f"{merger}.linear_fc1", (merged, merged))
        shapes |= _layer(f"{merger}.linear_fc2", (vision.out_hidden, merged))
    return shapes


def _layer(name: str, weight: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}
