"""Pillow's antialiased bicubic resize as ONNX nodes, to the last bit. Source: Pillow's libImaging/Resample.c.

Guarantees: the pixels equal those of Pillow 13 (`Image.resize` with BICUBIC) in a runtime with real float64
arithmetic, if no side shrinks to less than 1/128 of its length (see `MOST_TAPS`).

The filter's weights are computed in float64, operation by operation in Pillow's order, and rounded to the integers
that Pillow uses. Pixels are computed in float32 on integers below 2**24, which are exact in any order of summation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from builder.graph.image_preprocessor.expressions import Term, computes_float64, counted

CHANNELS = 3
# Pillow's: weights are multiples of 2**-22, and the filter reaches 2 pixels of the coarser of both grids.
PRECISION, REACH, SHARPNESS = 22, 2.0, -0.5
# Pillow 13 resizes the height first if it loses more than this many times what the width loses.
DOWN_FIRST = 2
# A weight is high * 2**8 + low, |low| <= 128. The absolute weights of a pixel sum to at most 1.3, which keeps a sum of
# 255 * high far below 2**24; a sum of 255 * low stays below it for up to MOST_TAPS weights.
LOW_BITS = 8
MOST_TAPS = 2**24 // (255 * 2 ** (LOW_BITS - 1))


@dataclass(frozen=True)
class Axis:
    """An axis of an image stored as [pixels, 3]: its length, and the distance of two neighbours in pixels, int64."""

    size: Term
    step: Term

    def places(self) -> Term:
        """The offset of each pixel, int32 [size]."""
        return (counted(self.size) * self.step).to(np.int32)


def resized(pixels: Term, y: Axis, x: Axis, rows: Term, columns: Term, unit: int) -> tuple[Term, Axis, Axis]:
    """Resize an image to rows * unit lines of columns * unit pixels; return it with its axes.

    Each side is resized separately and rounded to bytes in between, so that the order matters: up to Pillow 12, the
    width was always first. A side that keeps its length keeps its bytes, as its weights are 1 and 0.
    """
    down_first = (y.size - rows * unit) > (x.size - columns * unit).op("Max", 0) * DOWN_FIRST

    def select(yes: Term, no: Term) -> Term:
        return down_first.where(yes, no)

    first = Axis(select(y.size, x.size), select(y.step, x.step))
    second = Axis(select(x.size, y.size), select(x.step, y.step))
    pixels, first, second = _along(pixels, first, second, select(rows, columns), unit)
    pixels, second, first = _along(pixels, second, first, select(columns, rows), unit)
    y = Axis(rows * unit, select(first.step, second.step))
    x = Axis(columns * unit, select(second.step, first.step))
    return pixels, y, x


def _along(pixels: Term, side: Axis, other: Axis, units: Term, unit: int) -> tuple[Term, Axis, Axis]:
    """Resize `side` to units * unit pixels; return the image with both axes.

    New pixels are computed in blocks of `unit`. A block depends on a short range of old pixels, so that each block is
    a small matmul instead of a matmul with a matrix of all new by all old pixels.
    """
    first, high, low = weights(side.size, units, unit)
    reach = low.op("Shape", dtype=np.int64).gather(2)
    index = (first + counted(reach)).op("Min", side.size - 1)  # [units, reach]; weights past the end are 0
    places = (index * side.step).to(np.int32).expanded(2) + other.places()  # [units, reach, other]
    stretch = pixels.gather(places).reshape(units, reach, other.size * CHANNELS).to(np.float32)
    # (high * 2**8 + low + 2**21) >> 22 in integers below 2**24
    carried = (low.op("MatMul", stretch) * 2.0**-LOW_BITS).op("Floor")  # [units, unit, other * 3]
    summed = high.op("MatMul", stretch) + carried + 2.0 ** (PRECISION - LOW_BITS - 1)
    values = (summed * 2.0 ** (LOW_BITS - PRECISION)).op("Floor").op("Clip", 0, 255)
    one = side.size.formulas.constant(1, np.int64)
    return values.to(np.uint8).reshape(-1, CHANNELS), Axis(units * unit, other.size), Axis(other.size, one)


def weights(size: Term, units: Term, unit: int) -> tuple[Term, Term, Term]:
    """Filter weights along an axis. Source: Pillow's `precompute_coeffs` and `normalize_coeffs_8bpc`.

    Returns:
        Each block's first old pixel, int64 [units, 1], and the weights of the pixels from there on for each new pixel:
        high and low part, float32 [units, unit, reach].
    """
    length = units * unit
    old, new = size.to(np.float64), length.to(np.float64)
    scale = old / new
    stretch = scale.op("Max", 1.0)
    support = stretch * REACH
    centers = ((counted(new) + 0.5) * scale).reshape(units, unit)
    begin = (centers - support + 0.5).op("Floor").op("Max", 0.0).to(np.int64)
    end = (centers + support + 0.5).op("Floor").op("Min", old).to(np.int64)
    first = begin.gather(0, axis=1).expanded(1)  # [units, 1]
    reach = (end.gather(unit - 1, axis=1).expanded(1) - first).op("ReduceMax", keepdims=0)
    lines = (first + counted(reach)).expanded(1)  # [units, 1, reach]
    away = (lines.to(np.float64) - centers.expanded(2) + 0.5) * (1.0 / stretch)  # [units, unit, reach]
    # In float32, this small difference of two large numbers is inexact; computed on integers it is not.
    middles = ((counted(length) * 2 + 1) * size).reshape(units, unit, 1)
    exact = (lines * 2 + 1) * length - middles
    away = computes_float64(old).where(away, exact.to(np.float64) / (size.op("Max", length) * 2).to(np.float64))
    weight = (lines < size).where(bicubic(away.op("Abs")), 0.0)
    # A running sum adds in Pillow's order; zeros before and after change nothing.
    total = weight.op("CumSum", weight.formulas.constant(2, np.int64))
    total = total.gather(weight.formulas.constant([-1], np.int64), axis=2)
    share = weight / total * 2.0**PRECISION
    rounded = (share < 0.0).where((share - 0.5).op("Ceil"), (share + 0.5).op("Floor"))
    high = (rounded * 2.0**-LOW_BITS).op("Round")
    low = rounded - high * 2.0**LOW_BITS
    return first, high.to(np.float32), low.to(np.float32)


def bicubic(x: Term) -> Term:
    """Pillow's `bicubic_filter` of absolute distances."""
    near = (x * (SHARPNESS + 2.0) - (SHARPNESS + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * SHARPNESS
    return (x < 1.0).where(near, (x < REACH).where(far, 0.0))
