"""The image preprocessor of a bundle, in the bundle's runtime, against transformers' own.

In: a bundle's folder, and what makes pixel values of an image. Out: a gate an image. Guaranteed: the images are the
same every time; grids must be equal; a figure is the largest difference of a value, in levels of 1/255 of the image's
range, and 0 only where all values are equal bit for bit.
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
# Heights and widths: the smallest, sides ≡ 16 mod 64 (where the nearest grid is a tie), at their target, in need of
# being shrunk and grown, odd, lower rather than narrower, and of extreme ratios. tests/ has four times as many.
SIZES: tuple[Size, ...] = (
    *((1, 1), (1, 200), (31, 33), (237, 237), (400, 600), (272, 208)),
    *((256, 256), (511, 509), (463, 367), (13, 2600), (127, 129), (411, 31)),
)


def preprocessor_gates(folder: Path, target: str, reference: Reference, sizes: Sequence[Size] = SIZES) -> list[Gate]:
    """A gate an image; none where the bundle has no such graph."""
    path = preprocessor_file(folder)
    if path is None:
        return []
    std = reference.checkpoint.preprocessor["image_std"]
    return guarded(PLACE, NAME, compared, path, target, upstream(reference), std, sizes)


def golden_preprocessor_gates(folder: Path, target: str, vision: pipeline.ImageSettings) -> list[Gate]:
    """The same without transformers: against builder/targets/clients/pipeline.py, whose pixel values the golden's
    digests are of."""
    path = preprocessor_file(folder)
    if path is None:
        return []

    def ours(image: Array) -> tuple[Array, Array]:
        return pipeline.preprocess([Image.fromarray(image)], vision)

    return guarded(PLACE, NAME, compared, path, target, ours, vision.std, SIZES)


def preprocessor_file(folder: Path) -> Path | None:
    """The graph that has this role, if there is one."""
    path = graph_files(folder).get(NAME, folder / f"{NAME}.onnx")
    return path if path.is_file() else None


def upstream(reference: Reference) -> Preprocess:
    """transformers' processor."""

    def run(image: Array) -> tuple[Array, Array]:
        made: Mapping[str, Array] = reference.image_processor(images=[Image.fromarray(image)], return_tensors="np")
        return made["pixel_values"], made["image_grid_thw"]

    return run


def compared(
    path: Path, target: str, expected: Preprocess, std: Sequence[float], sizes: Sequence[Size] = SIZES
) -> list[Gate]:
    """Where the target's runtime is not here, the graph is run in ONNX Runtime, where nothing may differ."""
    runtime = RUNTIMES[target]
    here = runtime.missing() is None
    run = runtime.preprocessor(path) if here else in_onnxruntime(path)
    limit = runtime.tolerance if here else 0.0
    return [image_gate(size, run, expected, std, limit) for size in sizes]


def image_gate(size: Size, run: Preprocess, expected: Preprocess, std: Sequence[float], limit: float) -> Gate:
    """One image of that height and width."""
    image = drawn(*size)
    (pixels, grid), (want, want_grid) = run(image), expected(image)
    name = f"{size[0]} × {size[1]}, levels of 1/255"
    if grid.tolist() != want_grid.tolist() or pixels.shape != want.shape:
        told = f"grid {grid.tolist()}, expected {want_grid.tolist()}"
        return Gate(PLACE, name, math.inf, limit, told)
    off = deviation(pixels, want, std)
    return Gate(PLACE, name, off, limit, f"{(pixels != want).mean():.1e} of the values differ" if off else "")


def deviation(got: Array, want: Array, std: Sequence[float]) -> float:
    """The largest difference of two pixel values [patches, channels · …], in levels."""
    apart = np.abs(got.astype(np.float64) - want).reshape(len(got), len(std), -1)
    return float((apart * np.array(std)[:, None]).max() * 255)


def drawn(height: int, width: int) -> Array:
    """An image of noise, half of it black and white, which takes a filter's sums past either end of a byte."""
    rng = np.random.default_rng((height, width))
    levels = rng.integers(0, 256, (height, width, 3), np.uint8)
    return np.where(rng.random((height, width, 1)) < 0.5, (levels // 128) * np.uint8(255), levels)
