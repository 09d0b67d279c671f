"""Pillow's antialiased bicubic resize as ONNX nodes, to the last bit.

In: the bytes of an image, and how long each side is to become. Out: the bytes of the resized image.
Guaranteed: they are those of Pillow 13 (`Image.resize` with BICUBIC), where the runtime computes float64 as such and
no side becomes less than 1/128 as long (see `MOST_TAPS`). Upstream: libImaging/Resample.c.

How it is exact: the filter's weights are computed in float64, operation by operation in Pillow's order, and become
the whole numbers that Pillow computes with. What is done to each pixel is float32 on whole numbers below 2**24, which
float32 holds whatever the order of a sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from builder.graph.image_preprocessor.expressions import Term, computes_float64, counted

CHANNELS = 3
# Pillow's: a weight is a multiple of 2**-22. The filter reaches 2 pixels of the coarser one of both grids.
PRECISION, REACH, SHARPNESS = 22, 2.0, -0.5
# Pillow 13 goes down first where the height loses more than that many times what the width loses.
DOWN_FIRST = 2
# A weight is high * 2**8 + low, |low| <= 128. The weights of one pixel have absolute values of at most 1.3 together,
# which keeps a sum of 255 * high far below 2**24; a sum of 255 * low is below it for up to MOST_TAPS of them.
LOW_BITS = 8
MOST_TAPS = 2**24 // (255 * 2 ** (LOW_BITS - 1))


@dataclass(frozen=True)
class Axis:
    """One side of an image in bytes [pixels, 3]: its pixels, int64, and how far apart two neighbours lie."""

    size: Term
    step: Term

    def places(self) -> Term:
        """int32 [size]: where each lies."""
        return (counted(self.size) * self.step).to(np.int32)


def resized(pixels: Term, y: Axis, x: Axis, rows: Term, columns: Term, unit: int) -> tuple[Term, Axis, Axis]:
    """The image with rows * unit lines of columns * unit pixels, and the axes along which it lies.

    Each side by itself, rounded to bytes in between, which makes the order show: up to Pillow 12 every image went
    across first. A side that keeps its length keeps its bytes: its weights are 1 and 0.
    """
    down_first = (y.size - rows * unit) > (x.size - columns * unit).op("Max", 0) * DOWN_FIRST

    def which(yes: Term, no: Term) -> Term:
        return down_first.where(yes, no)

    lead = Axis(which(y.size, x.size), which(y.step, x.step))
    rest = Axis(which(x.size, y.size), which(x.step, y.step))
    once, lead, rest = _along(pixels, lead, rest, which(rows, columns), unit)
    twice, rest, lead = _along(once, rest, lead, which(columns, rows), unit)
    y = Axis(rows * unit, which(lead.step, rest.step))
    x = Axis(columns * unit, which(rest.step, lead.step))
    return twice, y, x


def _along(pixels: Term, side: Axis, other: Axis, units: Term, unit: int) -> tuple[Term, Axis, Axis]:
    """The image with units * unit pixels along one side, and both its axes.

    The new pixels go in blocks of `unit`. A block needs one stretch of old ones, so that the whole is a small product
    for each block, and not one with a matrix of all new by all old pixels.
    """
    first, high, low = weights(side.size, units, unit)
    reach = low.op("Shape", dtype=np.int64).gather(2)
    index = (first + counted(reach)).op("Min", side.size - 1)  # [units, reach]; what is past the end weighs 0
    places = (index * side.step).to(np.int32).expanded(2) + other.places()  # [units, reach, other]
    stretch = pixels.gather(places).reshape(units, reach, other.size * CHANNELS).to(np.float32)
    # (high * 2**8 + low + 2**21) >> 22 in whole numbers below 2**24
    carried = (low.op("MatMul", stretch) * 2.0**-LOW_BITS).op("Floor")  # [units, unit, other * 3]
    summed = high.op("MatMul", stretch) + carried + 2.0 ** (PRECISION - LOW_BITS - 1)
    levels = (summed * 2.0 ** (LOW_BITS - PRECISION)).op("Floor").op("Clip", 0, 255)
    one = side.size.formulas.constant(1, np.int64)
    return levels.to(np.uint8).reshape(-1, CHANNELS), Axis(units * unit, other.size), Axis(other.size, one)


def weights(size: Term, units: Term, unit: int) -> tuple[Term, Term, Term]:
    """Each block's first old pixel [units, 1], and the share that each new pixel takes of the pixels from there on:
    high and low part, float32 [units, unit, reach].

    Upstream: `precompute_coeffs` and `normalize_coeffs_8bpc`.
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
    # Where float64 is float32, that is a small difference of two large numbers; this is the same of whole ones.
    middles = ((counted(length) * 2 + 1) * size).reshape(units, unit, 1)
    whole = (lines * 2 + 1) * length - middles
    away = computes_float64(old).where(away, whole.to(np.float64) / (size.op("Max", length) * 2).to(np.float64))
    weight = (lines < size).where(bicubic(away.op("Abs")), 0.0)
    # A running sum, because it adds in Pillow's order; zeros before and behind change nothing.
    total = weight.op("CumSum", weight.formulas.constant(2, np.int64))
    total = total.gather(weight.formulas.constant([-1], np.int64), axis=2)
    share = weight / total * 2.0**PRECISION
    rounded = (share < 0.0).where((share - 0.5).op("Ceil"), (share + 0.5).op("Floor"))
    high = (rounded * 2.0**-LOW_BITS).op("Round")
    low = rounded - high * 2.0**LOW_BITS
    return first, high.to(np.float32), low.to(np.float32)


def bicubic(x: Term) -> Term:
    """Pillow's `bicubic_filter` of distances."""
    near = (x * (SHARPNESS + 2.0) - (SHARPNESS + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * SHARPNESS
    return (x < 1.0).where(near, (x < REACH).where(far, 0.0))
