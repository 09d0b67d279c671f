"""gptq: matmuls with correlated inputs have a smaller error than with rounding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from builder.quantization.blockwise import Blocks, dequantize, quantize
from builder.quantization.gptq import DAMPING, Compensation, compensation, quantize_compensated
from tests.helpers.small_graphs import Array, drawn

FORMATS = [
    pytest.param(Blocks(bits, 32, zero_points, "gptq"), id=f"int{bits}{' with zero points' * zero_points}")
    for bits in (4, 8)
    for zero_points in (False, True)
]


def correlated(columns: int = 128, seed: int = 3) -> Array:
    """The Hessian of inputs close to a few directions, with some columns far more active than others."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((columns // 4, columns)) * rng.lognormal(0, 1, columns)
    inputs = rng.standard_normal((1000, columns // 4)) @ mixed + 0.1 * rng.standard_normal((1000, columns))
    return np.asarray(inputs.T @ inputs / 1000, np.float32)


def output_error(wrong: Array, hessian: Array) -> float:
    """tr(D H Dᵀ): the mean squared error of the matmuls."""
    wrong = wrong.astype(np.float64)
    return float(np.einsum("ij,jk,ik->", wrong, hessian.astype(np.float64), wrong))


@pytest.mark.parametrize("format_", FORMATS)
def test_matmuls_are_closer_than_with_rounding_or_searched_scales(format_: Blocks) -> None:
    rows, hessian = drawn(48, 128), correlated()
    found = dequantize(quantize_compensated(rows, format_, compensation(hessian)))
    plain, searched = (dequantize(quantize(rows, replace(format_, search=search))) for search in ("none", "mse"))
    compensated = output_error(found - rows, hessian)
    assert compensated < 0.5 * output_error(searched - rows, hessian)
    assert compensated < 0.5 * output_error(plain - rows, hessian)
    # The weights' own error grows in return: the two must not be confused.
    assert np.square(found - rows).sum() > np.square(searched - rows).sum()


def test_the_hessian_of_other_inputs_does_not_help() -> None:
    """A control: errors compensated in the wrong directions."""
    rows, format_ = drawn(48, 128), Blocks(4, 32, search="gptq")
    searched = dequantize(quantize(rows, replace(format_, search="mse")))
    found = dequantize(quantize_compensated(rows, format_, compensation(correlated(seed=4))))
    assert output_error(found - rows, correlated()) > output_error(searched - rows, correlated())


@pytest.mark.parametrize("damping", [DAMPING, 0.3])
def test_the_factor_is_that_of_the_inverse_of_the_damped_hessian(damping: float) -> None:
    hessian = correlated(64)
    given = compensation(hessian, damping)
    upper = given.upper.astype(np.float64)
    assert np.abs(np.tril(upper, -1)).max() < 1e-6 * np.abs(upper).max()
    assert np.all(upper.diagonal() > 0)
    damped = hessian.astype(np.float64) + damping * float(hessian.diagonal().mean()) * np.eye(64)
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(64), atol=1e-4)
    np.testing.assert_array_equal(given.importance, hessian.diagonal())


@pytest.mark.parametrize("format_", FORMATS)
def test_rows_do_not_depend_on_one_another(format_: Blocks) -> None:
    rows, given = drawn(20, 64), compensation(correlated(64))
    before = quantize_compensated(rows, format_, given)
    rows[5:11] = 3 * drawn(6, 64, seed=9)
    after = quantize_compensated(rows, format_, given)
    others = np.r_[0:5, 11:20]
    for got, want in zip(vars(after).values(), vars(before).values(), strict=True):
        np.testing.assert_array_equal(got[others], want[others])
    assert (after.codes[5:11] != before.codes[5:11]).mean() > 0.3


@pytest.mark.parametrize("format_", FORMATS)
def test_nothing_is_compensated_if_columns_are_independent_and_alike(format_: Blocks) -> None:
    rows = drawn(20, 64)
    found = quantize_compensated(rows, format_, compensation(np.eye(64, dtype=np.float32)))
    want = quantize(rows, replace(format_, search="mse"))
    np.testing.assert_array_equal(found.codes, want.codes)
    np.testing.assert_array_equal(found.zeros, want.zeros)
    np.testing.assert_allclose(found.scales, want.scales, rtol=1e-5)


@pytest.mark.parametrize("format_", FORMATS)
def test_columns_that_were_never_active_are_rounded(format_: Blocks) -> None:
    dead = [3, 40, 63]
    hessian = correlated(64)
    hessian[dead], hessian[:, dead] = 0, 0
    given, rows = compensation(hessian), drawn(20, 64)
    assert np.isfinite(given.upper).all()
    assert np.all(given.importance > 0)
    found = quantize_compensated(rows, format_, given)
    wrong = np.abs(dequantize(found) - rows)[:, dead]
    blocks = [column // format_.size for column in dead]
    unclipped = (found.codes[:, dead] > 0) & (found.codes[:, dead] < format_.top)
    assert np.all((wrong <= np.abs(found.scales[:, blocks]) * 0.501) | ~unclipped)


def test_inputs_that_are_all_zero_are_rounded() -> None:
    rows, format_ = drawn(20, 64), Blocks(4, 32, search="gptq")
    given = compensation(np.zeros((64, 64), np.float32))
    found = dequantize(quantize_compensated(rows, format_, given))
    assert np.square(found - rows).mean() < 2 * np.square(dequantize(quantize(rows, format_)) - rows).mean()


def test_the_rows_that_are_given_stay_as_they_are() -> None:
    rows = drawn(20, 64)
    before = rows.copy()
    quantize_compensated(rows, Blocks(4, 32), compensation(correlated(64)))
    np.testing.assert_array_equal(rows, before)


def test_an_error_is_compensated_by_later_columns() -> None:
    """Two columns that are always equal: the second compensates what the first lost."""
    hessian = np.kron(np.eye(8), np.ones((2, 2))).astype(np.float32)
    rows, format_ = drawn(50, 16), Blocks(4, 16, search="gptq")
    given = compensation(hessian, damping=1e-4)
    wrong = dequantize(quantize_compensated(rows, format_, given)) - rows
    together = wrong.reshape(50, 8, 2).sum(-1)
    blind = Compensation(np.eye(16, dtype=np.float32), given.importance)
    apart = (dequantize(quantize_compensated(rows, format_, blind)) - rows).reshape(50, 8, 2).sum(-1)
    assert np.square(together).mean() < 0.7 * np.square(apart).mean()
