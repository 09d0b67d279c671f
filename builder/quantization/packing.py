"""Pack quantized matrices as ONNX Runtime's operators read them, and unpack them; nothing is rounded.

Codes, scales and zero points have the layout of com.microsoft::MatMulNBits, which com.microsoft::GatherBlockQuantized
reads as well, with each row's codes on a single axis.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from builder.quantization.blockwise import Blocks, Codes, Quantized

Part = Literal["levels", "scales", "zero_points"]  # suffixes of initializer names; "levels" are the codes


def parts(blocks: Blocks) -> tuple[Part, ...]:
    """The parts of a format, in the order of the data file."""
    return ("levels", "scales", "zero_points") if blocks.zero_points else ("levels", "scales")


def part_shape(part: Part, blocks: Blocks, rows: int, columns: int) -> tuple[int, ...]:
    """The shape in MatMulNBits: codes [rows, blocks, bytes], scales [rows, blocks], zero points [rows, bytes]."""
    count = columns // blocks.size
    if part == "levels":
        return rows, count, blocks.size * blocks.bits // 8
    return (rows, count) if part == "scales" else (rows, -(-count * blocks.bits // 8))


def lookup_shape(part: Part, blocks: Blocks, rows: int, columns: int) -> tuple[int, ...]:
    """The shape of the same bytes in GatherBlockQuantized: codes [rows, bytes]."""
    return (rows, columns * blocks.bits // 8) if part == "levels" else part_shape(part, blocks, rows, columns)


def pack(values: Codes, bits: int) -> Codes:
    """Pack codes of 4 or 8 bits, [rows, columns] → [rows, bytes]; of two codes, the first is the low nibble."""
    if bits == 8:
        return values
    rows, columns = values.shape
    if columns % 2:
        values = np.concatenate([values, np.zeros((rows, 1), np.uint8)], axis=1)
    packed: Codes = (values[:, 0::2] | (values[:, 1::2] << 4)).astype(np.uint8)
    return packed


def unpack(packed: Codes, bits: int, columns: int) -> Codes:
    """The inverse of `pack`: [rows, bytes] → [rows, columns]."""
    if bits == 8:
        return packed[:, :columns]
    both = np.stack([packed & 15, packed >> 4], axis=-1)
    values: Codes = both.reshape(len(packed), -1)[:, :columns]
    return values


def packed_parts(quantized: Quantized, blocks: Blocks, scales: str) -> dict[Part, npt.NDArray[np.generic]]:
    """Each part's array, in the shape of `part_shape`, except that the codes' last two axes are merged.

    Args:
        quantized: codes, scales and zero points.
        blocks: the format.
        scales: numpy's name of the scales' type.
    """
    packed: dict[Part, npt.NDArray[np.generic]] = {
        "levels": pack(quantized.codes, blocks.bits),
        "scales": quantized.scales.astype(scales),
    }
    return packed | ({"zero_points": pack(quantized.zeros, blocks.bits)} if blocks.zero_points else {})


def unpacked(
    codes: Codes, scales: npt.NDArray[np.generic], zero_points: Codes | None, blocks: Blocks, columns: int
) -> Quantized:
    """Codes, scales and zero points from an operator's inputs, in any of its shapes."""
    rows = len(codes)
    count = columns // blocks.size
    zeros = np.full((rows, count), blocks.middle, np.uint8)
    if zero_points is not None:
        zeros = unpack(zero_points.reshape(rows, -1), blocks.bits, count)
    return Quantized(
        unpack(codes.reshape(rows, -1), blocks.bits, columns),
        scales.reshape(rows, count).astype(np.float32),
        zeros,
    )
