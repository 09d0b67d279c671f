"""An ONNX graph from an image's bytes to `pixel_values` and `image_grid_thw`, for runtimes without a preprocessor.

In: the image settings of a checkpoint, as builder/checkpoint/image_settings.py has checked them; an opset. Out: a
model that takes one RGB image of any size, `image` uint8 [height, width, 3], and gives `pixel_values`
[patches, 3 * temporal * patch * patch] float32 and `image_grid_thw` [1, 3] int64.
Guaranteed: both are to the last bit what transformers' `Qwen2VLImageProcessorPil` makes of the image with Pillow 13,
in a runtime that computes float64 as such (ONNX Runtime does, in WebAssembly too). Standard operators only: no loop,
no branch, no other domain; about 25 kB in one file. Memory: four times what `pixel_values` takes.
Not guaranteed:
- An image with one side more than 200 times the other, which transformers refuses, is resized like any other: a graph
  raises no errors, so a client has to look first. The client also decodes the file, turns it by its EXIF orientation
  and makes it RGB.
- A runtime that computes float64 as float32 (OpenVINO's CPU plugin) takes other formulas where that would show. Grids
  are equal then, but for a few sizes of fewer pixels than `shortest_edge` where upstream's rounding misses a root that
  is whole (at Qwen3-VL's bounds 239 x 239 and some 80 oblong ones, 140 x 315 among them); about one value in ten
  thousand is off by 1/255, hardly any by 2/255.
- A side that becomes less than 1/128 as long (see builder/graph/image_preprocessor/resize.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from builder.graph.image_preprocessor.expressions import Formulas, Term, computes_float64, stacked
from builder.graph.image_preprocessor.resize import CHANNELS, Axis, resized

NAME = "image_preprocessor"


def image_preprocessor(settings: Mapping[str, Any], opset: int) -> ir.Model:
    """The graph for these settings (`Checkpoint.preprocessor`)."""
    formulas = Formulas()
    image = formulas.input("image", np.uint8, ("height", "width", CHANNELS))
    shape, one = image.op("Shape", dtype=np.int64), formulas.constant(1, np.int64)
    height, width = shape.gather(0), shape.gather(1)
    patch, merge, frames = (settings[key] for key in ("patch_size", "merge_size", "temporal_patch_size"))
    rows, columns = target_units(height, width, settings)
    pixels = image.reshape(-1, CHANNELS)
    pixels, y, x = resized(pixels, Axis(height, width), Axis(width, one), rows, columns, patch * merge)
    grid = stacked(*(side.reshape(1) for side in (one, rows * merge, columns * merge))).reshape(1, 3)
    outputs = [
        patched(pixels, y, x, settings).output("pixel_values", ("patches", CHANNELS * frames * patch * patch)),
        grid.output("image_grid_thw", (1, 3)),
    ]
    return formulas.model(NAME, [image.value], outputs, opset)


def target_units(height: Term, width: Term, settings: Mapping[str, Any]) -> tuple[Term, Term]:
    """How many squares of merge * merge patches an image is resized to, down and across: "smart resize".

    Upstream: `smart_resize` in image_processing_qwen2_vl.py. Its rounding and ONNX's take a half to the even.
    """
    unit = settings["patch_size"] * settings["merge_size"]
    least, most = settings["size"]["shortest_edge"], settings["size"]["longest_edge"]
    sides = [height.to(np.float64), width.to(np.float64)]
    nearest = [(side / unit).op("Round").to(np.int64) for side in sides]
    pixels, held = nearest[0] * nearest[1] * unit**2, (height * width).to(np.float64)
    shrink, grow = (held / most).op("Sqrt"), (least / held).op("Sqrt")
    float64, chosen = computes_float64(sides[0]), []
    for side, own, other, plain in zip(sides, (height, width), (width, height), nearest, strict=True):
        less, more = side / shrink / unit, side * grow / unit
        low, over = _beside_root(less, own, other, most, unit)
        fewer = float64.where(less.op("Floor").to(np.int64), low - (over > 0).to(np.int64)).op("Max", 1)
        high, over = _beside_root(more, own, other, least, unit)
        larger = float64.where(more.op("Ceil").to(np.int64), high + (over < 0).to(np.int64))
        chosen.append((pixels > most).where(fewer, (pixels < least).where(larger, plain)))
    return chosen[0], chosen[1]


def _beside_root(guess: Term, own: Term, other: Term, bound: int, unit: int) -> tuple[Term, Term]:
    """A whole number beside √(own * bound / other) / unit, and by how much its square is too large, in some measure.

    For runtimes whose float64 is float32, which would take a root that is whole for one a little larger.
    """
    number, common = guess.op("Round").to(np.int64), math.gcd(bound, unit**2)
    return number, number * number * other * (unit**2 // common) - own * (bound // common)


def patched(pixels: Term, y: Axis, x: Axis, settings: Mapping[str, Any]) -> Term:
    """Bytes [pixels, 3] → pixel_values. A square of merge * merge patches is in one piece."""
    patch, merge, frames = (settings[key] for key in ("patch_size", "merge_size", "temporal_patch_size"))
    places = y.places().reshape(-1, 1, merge, 1, patch, 1) + x.places().reshape(1, -1, 1, merge, 1, patch)
    levels = pixels.gather(places.reshape(-1, patch * patch)).transpose(0, 2, 1)  # [patches, 3, patch * patch]
    # A byte has 256 values: rescale and normalize are a table.
    table = normalized(settings)
    start = pixels.formulas.constant(256 * np.arange(CHANNELS).reshape(CHANNELS, 1), np.int32)
    values = pixels.formulas.constant(table.reshape(-1), table.dtype).gather(levels.to(np.int32) + start)
    # An image is `frames` equal frames.
    still = values.expanded(2).op("Expand", pixels.formulas.constant([1, 1, frames, 1], np.int64))
    return still.reshape(-1, CHANNELS * frames * patch * patch)


def normalized(settings: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 [3, 256]: what becomes of each level of each channel.

    Upstream: `rescale`, which multiplies in float64 and rounds, and `normalize` in image_transforms.py.
    """
    levels = (np.arange(256, dtype=np.float64) * settings.get("rescale_factor", 1 / 255)).astype(np.float32)
    mean, std = (np.array(settings[key], np.float32)[:, None] for key in ("image_mean", "image_std"))
    table: np.ndarray[Any, np.dtype[np.float32]] = (levels - mean) / std
    return table
