"""Distributions of the next token."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def log_softmax(logits: Array) -> Array:
    """Log-probabilities over the last axis, float64; NaN in a row with a NaN."""
    with np.errstate(invalid="ignore"):
        shifted = logits.astype(np.float64)
        shifted -= shifted.max(-1, keepdims=True)
        result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def kl_divergence(want: Array, got: Array) -> Array:
    """Σ p·ln(p/q) over the last axis of two arrays of log-probabilities, float64, in nats, at least 0; NaN where an
    input is NaN.

    A token that `want` rules out costs nothing, whatever `got` says about it.
    """
    weight = np.exp(want, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        terms = weight * (want.astype(np.float64) - got)
    total: Array = np.where(weight == 0, 0.0, terms).sum(-1)
    return np.maximum(total, 0.0)
