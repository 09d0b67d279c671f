"""How much memory a verification takes, whole or layer by layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Protocol

from builder.checkpoint.tensors import EMBEDDINGS as EMBEDDING_MATRIX
from builder.checkpoint.tensors import LM_HEAD

if TYPE_CHECKING:
    from builder.checkpoint.config import Vision
    from builder.checkpoint.safetensors import Tensor

SLICE = 10**9  # bytes of weights in one slice, if the memory allows as much

Mode = Literal["whole", "sliced"]
ITEM = 4  # bytes of an element in PyTorch: fp32
LAYERS = EMBEDDING_MATRIX.removesuffix("embed_tokens.weight") + "layers."
# The runtimes' and PyTorch's own, activations and logits: whole came to 2.68 GB where this makes it 2.70.
VERIFY_MEMORY = 1_000_000_000
# What the largest shipped picture adds where a comparison is whole: copies of its pixel values (0.38 GB came with it in
# the miniature), and four tensors [patches, intermediate] of the vision encoder, which is not measured.
LARGEST_PATCHES, LARGEST_PIXELS = 10_168, 400_000_000


class Sizes(Protocol):
    """What is known of a checkpoint from its config and headers."""

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    @property
    def vision(self) -> Vision: ...


def verify_memory(checkpoint: Sizes) -> tuple[int, int]:
    """Peak bytes of `verify`: whole (PyTorch and two sessions in memory), and sliced (a layer at a time)."""
    elements = {name: math.prod(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    layers: Counter[str] = Counter()
    for name, count in elements.items():
        if name.startswith(LAYERS):
            layers[name.removeprefix(LAYERS).partition(".")[0]] += count
    head = elements.get(LM_HEAD, elements[EMBEDDING_MATRIX])
    largest = LARGEST_PIXELS + 4 * ITEM * LARGEST_PATCHES * checkpoint.vision.intermediate
    whole = VERIFY_MEMORY + largest + 3 * ITEM * sum(elements.values())
    return whole, VERIFY_MEMORY + 2 * ITEM * max(*layers.values(), head)


def verify_mode(checkpoint: Sizes, memory: int) -> Mode:
    """Whole where that fits in `memory` bytes."""
    return "whole" if verify_memory(checkpoint)[0] <= memory else "sliced"
