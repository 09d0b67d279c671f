"""GPTQ (Frantar et al., 2022, https://arxiv.org/abs/2210.17323): each column's error is compensated by later columns.

In: rows of a matrix, and the Hessian E[x xᵀ] of its inputs. Out: codes, scales and zero points. Columns are taken in
their order; scales are searched a block at a time, on what is left to be quantized by then, each column's error
weighted by the Hessian's diagonal. Guaranteed: rows do not depend on one another; a column that was never active is
rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from builder.quantization.blockwise import Blocks, Quantized, Rows, scales_of

DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to it: directions that calibration has not seen


@dataclass(frozen=True)
class Compensation:
    """What follows from the Hessian.

    Args:
        upper: [columns, columns] fp32, the upper Cholesky factor of the inverse of the damped Hessian.
        importance: [columns] fp32, its diagonal.
    """

    upper: Rows
    importance: Rows


def compensation(hessian: npt.NDArray[np.float32], damping: float = DAMPING) -> Compensation:
    """From E[x xᵀ] of the inputs, [columns, columns]."""
    diagonal = hessian.diagonal().copy()
    mean = float(diagonal.mean()) or 1.0
    work = hessian.astype(np.float64)
    at = np.arange(len(work))
    work[at, at] = np.where(diagonal > 0, diagonal, mean) + damping * mean
    # inv(H) = Lᵀ⁻¹ L⁻¹; its upper factor comes from the lower one of the Hessian in reverse order.
    reverse = np.linalg.cholesky(work[::-1, ::-1])
    upper = np.linalg.inv(reverse)[::-1, ::-1]
    return Compensation(np.ascontiguousarray(upper, np.float32), np.maximum(diagonal, 1e-6 * mean).astype(np.float32))


def quantize_compensated(rows: Rows, blocks: Blocks, given: Compensation) -> Quantized:
    """Quantizes fp32 [rows, columns]; `columns` is a multiple of the block size."""
    count, columns = rows.shape
    left = np.ascontiguousarray(rows.T)  # columns are rows here: they are read and changed one after the other
    codes = np.empty((columns, count), np.uint8)
    scales = np.empty((columns // blocks.size, count), np.float32)
    zeros = np.empty_like(scales)
    errors = np.empty((blocks.size, count), np.float32)
    for number, begin in enumerate(range(0, columns, blocks.size)):
        end = begin + blocks.size
        part = left[begin:end]
        scale, zero = scales_of(np.ascontiguousarray(part.T), blocks, given.importance[begin:end])
        scales[number], zeros[number] = scale[:, 0], zero[:, 0]
        inverse = 1 / scales[number]
        for at in range(blocks.size):
            column, upper = part[at], given.upper[begin + at]
            code = np.clip(np.rint(column * inverse) + zeros[number], 0, blocks.top)
            codes[begin + at] = code
            error = (column - (code - zeros[number]) * scales[number]) / upper[begin + at]
            errors[at] = error
            part[at + 1 :] -= upper[begin + at + 1 : end, None] * error
        left[end:] -= given.upper[begin:end, end:].T @ errors
    return Quantized(
        np.ascontiguousarray(codes.T), np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T).astype(np.uint8)
    )
