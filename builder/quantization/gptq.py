"""GPTQ (Frantar et al., 2022, https://arxiv.org/abs/2210.17323): each column's error is compensated by later columns.

Columns are quantized in order. The scales of a block are searched when its turn comes, on the compensated weights, with
errors weighted by the diagonal of the Hessian E[x xᵀ]. Guarantees: rows are independent of each other; a column whose
input was always zero is rounded to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from builder.quantization.blockwise import Blocks, Quantized, Rows, scales_of

DAMPING = 0.01  # times the mean of the Hessian's diagonal, added to it for directions that calibration did not cover


@dataclass(frozen=True)
class Compensation:
    """What GPTQ needs of the Hessian.

    Args:
        upper: [columns, columns] fp32, the upper Cholesky factor of the inverse of the damped Hessian.
        importance: [columns] fp32, the Hessian's diagonal.
    """

    upper: Rows
    importance: Rows


def compensation(hessian: npt.NDArray[np.float32], damping: float = DAMPING) -> Compensation:
    """Factor the Hessian E[x xᵀ] of the inputs, [columns, columns]."""
    diagonal = hessian.diagonal().copy()
    mean = float(diagonal.mean()) or 1.0
    work = hessian.astype(np.float64)
    at = np.arange(len(work))
    work[at, at] = np.where(diagonal > 0, diagonal, mean) + damping * mean
    # inv(H) = Lᵀ⁻¹ L⁻¹; its upper factor comes from the lower one of the Hessian in reverse order.
    reverse = np.linalg.cholesky(work[::-1, ::-1])
    upper = np.linalg.inv(reverse)[::-1, ::-1]
    return Compensation(np.ascontiguousarray(upper, np.float32), np.maximum(diagonal, 1e-6 * mean).astype(np.float32))


def quantize_compensated(rows: Rows, blocks: Blocks, hessian: Compensation) -> Quantized:
    """Quantize fp32 [rows, columns]; `columns` is a multiple of the block size."""
    count, columns = rows.shape
    left = np.ascontiguousarray(rows.T)  # transposed, as columns are read and changed in turn
    codes = np.empty((columns, count), np.uint8)
    scales = np.empty((columns // blocks.size, count), np.float32)
    zeros = np.empty_like(scales)
    errors = np.empty((blocks.size, count), np.float32)
    for number, begin in enumerate(range(0, columns, blocks.size)):
        end = begin + blocks.size
        part = left[begin:end]
        scale, zero = scales_of(np.ascontiguousarray(part.T), blocks, hessian.importance[begin:end])
        scales[number], zeros[number] = scale[:, 0], zero[:, 0]
        inverse = 1 / scales[number]
        for at in range(blocks.size):
            column, upper = part[at], hessian.upper[begin + at]
            code = np.clip(np.rint(column * inverse) + zeros[number], 0, blocks.top)
            codes[begin + at] = code
            error = (column - (code - zeros[number]) * scales[number]) / upper[begin + at]
            errors[at] = error
            part[at + 1 :] -= upper[begin + at + 1 : end, None] * error
        left[end:] -= hessian.upper[begin:end, end:].T @ errors
    return Quantized(
        np.ascontiguousarray(codes.T), np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T).astype(np.uint8)
    )
