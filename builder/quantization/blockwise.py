"""Blockwise quantization of fp32 rows: each block gets codes, a scale and, in some formats, a zero point.

Guarantees: rows are independent of each other, so that the result does not depend on how a matrix is split, nor on the
number of threads; blocks of zeros, of equal values or of denormal numbers have finite scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Search = Literal["none", "mse", "gptq"]
Rows = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

SMALLEST, LARGEST_BLOCK = 16, 256  # block sizes that the runtimes' kernels support
# A block's scale is its largest magnitude, divided by 2^(bits - 1) and by each of these. Above 1, the largest value is
# clipped a little and all others get finer steps; below 1, some codes are unused, which suits blocks whose second
# largest magnitude has the other sign. More candidates gain little (six got 96 % of the gain of twenty, on normal and
# on trained weights).
DIVISORS = (1.0, 0.86, 0.93, 1.08, 1.16)
SPANS = (1.0, 0.94, 0.88, 0.82)  # with zero points: fraction of the block's range that codes cover
TINY = np.float32(1e-30)
PIECE = 1 << 16  # elements at a time, which fit a core's cache together with the temporaries


@dataclass(frozen=True)
class Blocks:
    """A blockwise quantization format.

    Args:
        bits: bits of a code, 4 or 8.
        size: elements of a row that share a scale.
        zero_points: whether each block has a zero point; if not, the middle code is zero.
        search: "none" rounds to nearest; "mse" tries several scales for each block and keeps the scale of the smallest
            squared error; "gptq" weights errors by real activations and compensates them
            (builder/quantization/gptq.py).
    """

    bits: int
    size: int
    zero_points: bool = False
    search: Search = "none"

    @property
    def middle(self) -> int:
        """The code for zero in a format without zero points."""
        return 1 << (self.bits - 1)

    @property
    def top(self) -> int:
        """The highest code."""
        return (1 << self.bits) - 1

    @property
    def bits_per_weight(self) -> float:
        """Average bits of a weight, fp32 scales and zero points included."""
        return self.bits + (32 + (self.bits if self.zero_points else 0)) / self.size

    def fitting(self, columns: int) -> int | None:
        """The largest of `size`, `size` / 2, … that divides a row of `columns`; None if that is below `SMALLEST`."""
        sizes = (self.size >> shift for shift in range(self.size.bit_length()))
        return next((size for size in sizes if size >= SMALLEST and columns % size == 0), None)


@dataclass(frozen=True)
class Quantized:
    """codes [rows, columns] uint8; scales [rows, blocks] fp32; zeros [rows, blocks] uint8, explicit or implied."""

    codes: Codes
    scales: Rows
    zeros: Codes


def scales_of(flat: Rows, blocks: Blocks, importance: Rows | None = None) -> tuple[Rows, Rows]:
    """Scale and zero point of each block.

    Args:
        flat: blocks, fp32 [count, size].
        blocks: the format.
        importance: weight of each column's squared error in the search, [size]; None for equal weights.

    Returns:
        Scales and zero points, fp32 [count, 1] each.
    """
    quantize_blocks = _asymmetric if blocks.zero_points else _symmetric
    _, scales, zeros = quantize_blocks(flat, blocks, importance)
    return scales, zeros.astype(np.float32)


def quantize(rows: Rows, blocks: Blocks) -> Quantized:
    """Quantize fp32 [rows, columns]; `columns` is a multiple of the block size."""
    count, columns = rows.shape
    codes = np.empty((count, columns), np.uint8)
    scales = np.empty((count, columns // blocks.size), np.float32)
    zeros = np.empty(scales.shape, np.uint8)
    step = max(1, PIECE // columns)
    for start in range(0, count, step):
        part = slice(start, start + step)
        flat = np.ascontiguousarray(rows[part], np.float32).reshape(-1, blocks.size)  # [blocks, size]
        code, scale, zero = _asymmetric(flat, blocks) if blocks.zero_points else _symmetric(flat, blocks)
        codes[part] = code.reshape(-1, columns)
        scales[part] = scale.reshape(-1, scales.shape[1])
        zeros[part] = zero.reshape(-1, scales.shape[1])
    return Quantized(codes, scales, zeros)


def dequantize(quantized: Quantized) -> Rows:
    """(code - zero) · scale, fp32 [rows, columns]."""
    count, columns = quantized.codes.shape
    shape = (count, quantized.scales.shape[1], -1)
    centred = quantized.codes.reshape(shape).astype(np.float32) - quantized.zeros[..., None]
    result: Rows = (centred * quantized.scales[..., None]).reshape(count, columns)
    return result


def _symmetric(flat: Rows, blocks: Blocks, importance: Rows | None = None) -> tuple[Codes, Rows, Codes]:
    """Codes around the middle code: the largest magnitude gets the lowest code, as its range is one step larger."""
    low, high = np.float32(-blocks.middle), np.float32(blocks.middle - 1)
    largest = np.take_along_axis(flat, np.abs(flat).argmax(1)[:, None], 1)  # with its sign
    largest[np.abs(largest) < TINY] = TINY
    best = largest / low
    codes, room = np.empty_like(flat), np.empty_like(flat)
    if blocks.search != "none":
        least = np.full((len(flat), 1), np.inf, np.float32)
        for divisor in DIVISORS:
            scale = largest / np.float32(divisor * low)
            _round(flat, scale, low, high, codes)
            # With the scale that fits these codes best, the squared error is Σx² - (Σxc)² / Σc².
            across, own = _dot(flat, codes, importance), np.maximum(_dot(codes, codes, importance), TINY)
            error = -across * across / own
            better = error < least
            np.copyto(best, _finite(across / own, scale), where=better)
            np.copyto(least, error, where=better)
        best[np.abs(best) < TINY] = TINY
    _round(flat, best, low, high, codes)
    np.subtract(codes, low, out=room)
    return room.astype(np.uint8), best, np.full(best.shape, blocks.middle, np.uint8)


def _asymmetric(flat: Rows, blocks: Blocks, importance: Rows | None = None) -> tuple[Codes, Rows, Codes]:
    """Codes from the block's minimum to its maximum, zero included."""
    top = np.float32(blocks.top)
    low = np.minimum(flat.min(1, keepdims=True), 0)
    high = np.maximum(flat.max(1, keepdims=True), 0)
    codes = np.empty_like(flat)
    least = np.full((len(flat), 1), np.inf, np.float32)
    best, zero = np.empty_like(low), np.empty_like(low)
    for span in SPANS if blocks.search != "none" else SPANS[:1]:
        share = np.float32(span) / top
        scale = np.maximum(_finite((high - low) * np.float32(span) / top, high * share - low * share), TINY)
        middle = np.clip(np.rint(-low * np.float32(span) / scale), 0, top)
        _round(flat, scale, -middle, top - middle, codes)
        across, own = _dot(flat, codes, importance), np.maximum(_dot(codes, codes, importance), TINY)
        error = -across * across / own
        better = error < least
        fitted = _finite(np.maximum(across / own, TINY), scale) if blocks.search != "none" else scale
        np.copyto(best, fitted, where=better)
        np.copyto(zero, middle, where=better)
        np.copyto(least, error, where=better)
    _round(flat, best, -zero, top - zero, codes)
    return (codes + zero).astype(np.uint8), best, zero.astype(np.uint8)


def _round(flat: Rows, scale: Rows, low: Rows | np.float32, high: Rows | np.float32, out: Rows) -> None:
    """Write clip(round(x / scale), low, high) to `out`."""
    np.multiply(flat, np.float32(1) / scale, out=out)
    np.rint(out, out=out)
    np.clip(out, low, high, out=out)


def _finite(values: npt.NDArray[Any], fallback: Rows) -> Rows:
    """`values`, or `fallback` where a sum of huge values overflowed fp32."""
    finite: Rows = np.where(np.isfinite(values), values, fallback)
    return finite


def _dot(a: Rows, b: Rows, importance: Rows | None) -> Rows:
    """The dot product of each pair of rows, weighted by column, [blocks, 1]."""
    dot: Rows = np.einsum("ij,ij->i", a, b) if importance is None else np.einsum("ij,ij,j->i", a, b, importance)
    return dot[:, None]
