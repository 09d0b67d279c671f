"""An ONNX graph from an image's bytes to `pixel_values` and `image_grid_thw`, for runtimes without a preprocessor.

Input: an RGB image of any size, `image` uint8 [height, width, 3]. Outputs: `pixel_values` float32
[patches, 3 * temporal * patch * patch] and `image_grid_thw` int64 [1, 3]. Standard operators only, without loops and
branches; about 25 kB in one file. Memory: four times the size of `pixel_values`.

Guarantees: both outputs equal those of transformers' `Qwen2VLImageProcessorPil` with Pillow 13 to the last bit, in a
runtime with real float64 arithmetic (ONNX Runtime, in WebAssembly too). Exceptions:

- An image with one side more than 200 times the other, which transformers rejects, is resized like any other: a graph
  cannot raise errors, so the client has to check. The client also decodes the file, applies its EXIF orientation and
  converts it to RGB.
- A runtime that computes float64 in float32 (OpenVINO's CPU plugin) uses other formulas where it matters. Grids are
  equal then, except for a few sizes of fewer pixels than `shortest_edge` where upstream's rounding misses an integer
  root (at Qwen3-VL's bounds 239 x 239 and about 80 that are not square, such as 140 x 315); about one value in ten
  thousand differs by 1/255, hardly any by 2/255.
- A side that shrinks to less than 1/128 of its length (see builder/graph/image_preprocessor/resize.py).
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
    """Build the graph.

    Args:
        settings: image settings of a checkpoint (`Checkpoint.preprocessor`), already validated.
        opset: version of the standard operators.
    """
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
    """Rows and columns of merge * merge patches that an image is resized to.

    Source: `smart_resize` in transformers' image_processing_qwen2_vl.py, which rounds half to even, as ONNX does.
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
        low, over = _near_root(less, own, other, most, unit)
        fewer = float64.where(less.op("Floor").to(np.int64), low - (over > 0).to(np.int64)).op("Max", 1)
        high, over = _near_root(more, own, other, least, unit)
        larger = float64.where(more.op("Ceil").to(np.int64), high + (over < 0).to(np.int64))
        chosen.append((pixels > most).where(fewer, (pixels < least).where(larger, plain)))
    return chosen[0], chosen[1]


def _near_root(guess: Term, own: Term, other: Term, bound: int, unit: int) -> tuple[Term, Term]:
    """An integer near √(own * bound / other) / unit, and a number with the sign of its error.

    For runtimes that compute float64 in float32, which may take an integer root for a slightly larger number.
    """
    number, common = guess.op("Round").to(np.int64), math.gcd(bound, unit**2)
    return number, number * number * other * (unit**2 // common) - own * (bound // common)


def patched(pixels: Term, y: Axis, x: Axis, settings: Mapping[str, Any]) -> Term:
    """Pixels, uint8 [pixels, 3] → pixel_values; the patches of a merge * merge square are consecutive."""
    patch, merge, frames = (settings[key] for key in ("patch_size", "merge_size", "temporal_patch_size"))
    places = y.places().reshape(-1, 1, merge, 1, patch, 1) + x.places().reshape(1, -1, 1, merge, 1, patch)
    channels = pixels.gather(places.reshape(-1, patch * patch)).transpose(0, 2, 1)  # [patches, 3, patch * patch]
    # A byte has 256 values, so that a table can rescale and normalize.
    table = normalized(settings)
    start = pixels.formulas.constant(256 * np.arange(CHANNELS).reshape(CHANNELS, 1), np.int32)
    values = pixels.formulas.constant(table.reshape(-1), table.dtype).gather(channels.to(np.int32) + start)
    # An image becomes `frames` equal frames.
    still = values.expanded(2).op("Expand", pixels.formulas.constant([1, 1, frames, 1], np.int64))
    return still.reshape(-1, CHANNELS * frames * patch * patch)


def normalized(settings: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The rescaled and normalized value of each byte in each channel, float32 [3, 256].

    Source: transformers' `rescale`, which multiplies in float64 and rounds, and `normalize` in image_transforms.py.
    """
    rescaled = (np.arange(256, dtype=np.float64) * settings.get("rescale_factor", 1 / 255)).astype(np.float32)
    mean, std = (np.array(settings[key], np.float32)[:, None] for key in ("image_mean", "image_std"))
    table: np.ndarray[Any, np.dtype[np.float32]] = (rescaled - mean) / std
    return table
