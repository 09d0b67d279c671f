"""Estimate the memory that a verification needs, with the complete model or layer by layer."""

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

Mode = Literal["whole", "layerwise"]
ITEM = 4  # bytes of an element in PyTorch: fp32
LAYERS = EMBEDDING_MATRIX.removesuffix("embed_tokens.weight") + "layers."
SLICE = 10**9  # bytes of weights in one slice, if memory allows; chosen
# Bytes, measured on 2 x86-64 cores. The figures that only `--dry-run` shows are in builder/stages/engine/measured.py.
VERIFY_MEMORY = 1_000_000_000  # the runtimes, PyTorch, activations, logits: measured 2.68e9, estimated 2.70e9
LARGEST_PATCHES = 10_168  # of the largest shipped image; times four tensors [patches, intermediate], an estimate
LARGEST_PIXELS = 400_000_000  # copies of that image's pixel values: 0.38e9 in the miniature


class Sizes(Protocol):
    """The facts about a checkpoint that its config and headers give."""

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    @property
    def vision(self) -> Vision: ...


def verify_memory(checkpoint: Sizes) -> tuple[int, int]:
    """Return peak bytes of `verify` with the complete model (PyTorch and two sessions), and layer by layer."""
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
    """Return "whole" if that fits in `memory` bytes, else "layerwise"."""
    return "whole" if verify_memory(checkpoint)[0] <= memory else "layerwise"
