"""Divergence of next-token distributions: against the formula, and in edge cases."""

from __future__ import annotations

import math

import numpy as np
import pytest

from builder.util.statistics import Array, kl_divergence, log_softmax


def divergence(want: Array, got: Array) -> float:
    return float(kl_divergence(log_softmax(want), log_softmax(got)))


def test_divergence_follows_the_formula() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert divergence(np.log(p) + 7, np.log(q) - 3) == pytest.approx(expected, rel=1e-12)
    assert divergence(np.log(p), np.log(p)) == 0
    barred = np.array([1.0, -np.inf, 2.0])
    assert divergence(barred, np.array([1.0, 5.0, 2.0])) > 0.1
    assert math.isinf(divergence(np.array([1.0, 5.0, 2.0]), barred))
    assert math.isnan(divergence(np.array([1.0, np.nan]), np.array([1.0, 2.0])))


def test_divergence_has_one_value_per_row() -> None:
    rows = np.random.default_rng(0).standard_normal((2, 5, 7))
    want = log_softmax(rows[0])
    assert kl_divergence(want, log_softmax(rows[1])).shape == (5,)
    assert kl_divergence(want, want).tolist() == [0.0] * 5
