"""Compare a bundle's image preprocessor graph with transformers' processor.

Grids must be equal. A gate measures the largest difference of a pixel value, in steps of 1/255 of the image's range; it
is 0 only if all values are bitwise equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from builder.bundle.layout import graph_files
from builder.reference.model import Reference
from builder.targets.clients import pipeline
from builder.targets.image_preprocessor import NAME, Preprocess, in_onnxruntime
from builder.targets.runners.registry import RUNTIMES
from builder.verify.report.gates import Gate, guarded

Array = npt.NDArray[Any]
Size = tuple[int, int]
PLACE = "image preprocessor"
# (height, width): the smallest, sides ≡ 16 mod 64 (where the nearest grid is a tie), already at the target size, to be
# shrunk, to be enlarged, odd, landscape, and of extreme aspect ratios. tests/ has four times as many.
SIZES: tuple[Size, ...] = (
    *((1, 1), (1, 200), (31, 33), (237, 237), (400, 600), (272, 208)),
    *((256, 256), (511, 509), (463, 367), (13, 2600), (127, 129), (411, 31)),
)


def preprocessor_gates(folder: Path, target: str, reference: Reference, sizes: Sequence[Size] = SIZES) -> list[Gate]:
    """Return a gate per image size; none if the bundle has no such graph."""
    path = preprocessor_file(folder)
    if path is None:
        return []
    std = reference.checkpoint.preprocessor["image_std"]
    return guarded(PLACE, NAME, size_gates, path, target, transformers_preprocess(reference), std, sizes)


def golden_preprocessor_gates(folder: Path, target: str, vision: pipeline.ImageSettings) -> list[Gate]:
    """Compare with builder/targets/clients/pipeline.py instead of transformers; a golden covers its pixel values."""
    path = preprocessor_file(folder)
    if path is None:
        return []

    def ours(image: Array) -> tuple[Array, Array]:
        return pipeline.preprocess([Image.fromarray(image)], vision)

    return guarded(PLACE, NAME, size_gates, path, target, ours, vision.std, SIZES)


def preprocessor_file(folder: Path) -> Path | None:
    """Return the path of the preprocessor graph, or None if the bundle has none."""
    path = graph_files(folder).get(NAME, folder / f"{NAME}.onnx")
    return path if path.is_file() else None


def transformers_preprocess(reference: Reference) -> Preprocess:
    """Return transformers' image processor as a function of an image."""

    def run(image: Array) -> tuple[Array, Array]:
        outputs: Mapping[str, Array] = reference.image_processor(images=[Image.fromarray(image)], return_tensors="np")
        return outputs["pixel_values"], outputs["image_grid_thw"]

    return run


def size_gates(
    path: Path, target: str, expected: Preprocess, std: Sequence[float], sizes: Sequence[Size] = SIZES
) -> list[Gate]:
    """Compare each size in the target's runtime; without it, in ONNX Runtime, where values must be bitwise equal."""
    runtime = RUNTIMES[target]
    installed = runtime.missing() is None
    run = runtime.preprocessor(path) if installed else in_onnxruntime(path)
    limit = runtime.tolerance if installed else 0.0
    return [image_gate(size, run, expected, std, limit) for size in sizes]


def image_gate(size: Size, run: Preprocess, expected: Preprocess, std: Sequence[float], limit: float) -> Gate:
    """Compare one synthetic image of the given (height, width)."""
    image = synthetic_image(*size)
    (pixels, grid), (want, want_grid) = run(image), expected(image)
    name = f"{size[0]} × {size[1]}, levels of 1/255"
    if grid.tolist() != want_grid.tolist() or pixels.shape != want.shape:
        return Gate(PLACE, name, math.inf, limit, f"grid {grid.tolist()}, expected {want_grid.tolist()}")
    off = deviation(pixels, want, std)
    return Gate(PLACE, name, off, limit, f"{(pixels != want).mean():.1e} of the values differ" if off else "")


def deviation(got: Array, want: Array, std: Sequence[float]) -> float:
    """Return the largest difference of pixel values [patches, channels · …], in steps of 1/255."""
    gaps = np.abs(got.astype(np.float64) - want).reshape(len(got), len(std), -1)
    return float((gaps * np.array(std)[:, None]).max() * 255)


def synthetic_image(height: int, width: int) -> Array:
    """Return noise [height, width, 3] uint8; half of it is black and white, so that a filter's sums overflow a byte."""
    rng = np.random.default_rng((height, width))
    noise = rng.integers(0, 256, (height, width, 3), np.uint8)
    return np.where(rng.random((height, width, 1)) < 0.5, (noise // 128) * np.uint8(255), noise)
