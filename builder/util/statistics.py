"""Log-probabilities of the next token, and their divergence."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def log_softmax(logits: Array) -> Array:
    """Return log-probabilities over the last axis, float64; a row with a NaN becomes NaN."""
    with np.errstate(invalid="ignore"):
        shifted = logits.astype(np.float64)
        shifted -= shifted.max(-1, keepdims=True)
        result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def kl_divergence(want: Array, got: Array) -> Array:
    """Return the Kullback-Leibler divergence Σ p·ln(p/q) over the last axis, float64, in nats, at least 0.

    Args:
        want: log-probabilities ln p; a token of probability 0 contributes 0.
        got: log-probabilities ln q, of the same shape.

    Returns:
        one axis less than the inputs; NaN where an input is NaN.
    """
    weight = np.exp(want, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        terms = weight * (want.astype(np.float64) - got)
    total: Array = np.where(weight == 0, 0.0, terms).sum(-1)
    return np.maximum(total, 0.0)
