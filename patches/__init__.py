"""Patches of transformers that make Qwen3-VL exportable, by name and by kind of attention.

Importing this package loads neither torch nor transformers; the first call does.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from builder.util.errors import MissingPackageError, PatchError

if TYPE_CHECKING:
    from patches.registry import Patch

SETS: dict[str, tuple[str, ...]] = {
    "eager": ("text_rotary", "vision_forward", "vision_attention", "text_attention_eager"),
    "fused": ("text_rotary", "vision_forward", "vision_attention_fused", "text_attention_fused"),
}


def all_patches() -> tuple[Patch, ...]:
    """Return all patches, in the order in which the user sees them.

    Raises:
        MissingPackageError: torch or transformers is not installed.
    """
    try:
        from patches import (
            text_attention_eager,
            text_attention_fused,
            text_rotary,
            vision_attention,
            vision_attention_fused,
            vision_forward,
        )
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == __name__:
            raise
        raise MissingPackageError(
            f"the patches need {error.name}, which is not installed", next='pip install "qwen3vl-onnx[build]"'
        ) from error
    text = (text_rotary, text_attention_eager, text_attention_fused)
    return tuple(module.PATCH for module in (*text, vision_forward, vision_attention, vision_attention_fused))


def patch(name: str) -> Patch:
    """Return the patch of that name.

    Raises:
        PatchError: no such patch; suggests the nearest spelling.
    """
    by_name = {each.name: each for each in all_patches()}
    if name in by_name:
        return by_name[name]
    near = difflib.get_close_matches(name, by_name, 1)
    raise PatchError(
        f"no patch is named {name!r}",
        expected=", ".join(by_name),
        next=f"did you mean {near[0]!r}?" if near else None,
    )


def patches_for(attention: str) -> tuple[Patch, ...]:
    """Return the patches for an export with "eager" or "fused" attention, in order of installation."""
    if attention not in SETS:
        raise PatchError(f"no set of patches for attention = {attention!r}", expected=" or ".join(SETS))
    return tuple(patch(name) for name in SETS[attention])
