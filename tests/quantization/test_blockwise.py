"""blockwise: the error of each weight for all kinds of blocks, and the same result in pieces."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from builder.quantization import blockwise
from builder.quantization.blockwise import LARGEST_BLOCK, SMALLEST, Blocks, Quantized, dequantize, quantize, scales_of
from tests.helpers.small_graphs import Array, drawn

FORMATS = [
    pytest.param(Blocks(bits, size, zero_points), id=f"int{bits} of {size}{' with zero points' * zero_points}")
    for bits in (4, 8)
    for size in (16, 64)
    for zero_points in (False, True)
]


def heavy(rows: int, columns: int) -> Array:
    """Weights with tails, as in trained models: Student's t with three degrees of freedom."""
    return np.random.default_rng([7, rows, columns]).standard_t(3, (rows, columns)).astype(np.float32)


def by_block(values: Array, format_: Blocks) -> Array:
    """[rows, blocks, size]"""
    return values.reshape(len(values), -1, format_.size)


def error_of(values: Array, format_: Blocks) -> Array:
    """Squared error of each block, [rows, blocks] in float64."""
    wrong = dequantize(quantize(values, format_)).astype(np.float64) - values
    found: Array = (by_block(wrong, format_) ** 2).sum(-1)
    return found


def clipped(values: Array, quantized: Quantized, format_: Blocks) -> Array:
    """[rows, blocks, size]: whether there is no level that far."""
    exact = by_block(values, format_) / quantized.scales[..., None] + quantized.zeros[..., None]
    return np.asarray((exact < -0.5) | (exact > format_.top + 0.5))


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("search", ["none", "mse"])
def test_unclipped_values_are_at_most_half_a_scale_off(format_: Blocks, search: blockwise.Search) -> None:
    format_, values = replace(format_, search=search), heavy(48, 128)
    found = quantize(values, format_)
    wrong = np.abs(by_block(dequantize(found) - values, format_))
    half = np.abs(found.scales[..., None]) / 2
    outside = clipped(values, found, format_)
    assert np.all((wrong <= half * 1.0001) | outside)
    assert outside.mean() < 0.05
    assert found.codes.max() <= format_.top
    if format_.zero_points and search == "none":
        assert not outside.any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [16, 64])
def test_without_a_search_the_largest_magnitude_gets_an_exact_level(bits: int, size: int) -> None:
    format_, values = Blocks(bits, size), heavy(48, 128)
    found = quantize(values, format_)
    at = np.abs(by_block(values, format_)).argmax(-1)[..., None]
    assert not np.take_along_axis(by_block(found.codes, format_), at, -1).any()
    got = np.take_along_axis(by_block(dequantize(found), format_), at, -1)
    np.testing.assert_allclose(got, np.take_along_axis(by_block(values, format_), at, -1), rtol=1e-6)


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("kind", ["normal", "heavy", "uniform", "one sign", "one outlier"])
def test_the_search_is_no_worse_in_any_block_and_better_over_all(format_: Blocks, kind: str) -> None:
    values = {
        "normal": drawn(64, 128),
        "heavy": heavy(64, 128),
        "uniform": np.random.default_rng(1).uniform(-1, 1, (64, 128)).astype(np.float32),
        "one sign": np.abs(drawn(64, 128)) + np.float32(0.5),
        "one outlier": drawn(64, 128) * np.where(np.arange(128) % 16, np.float32(1), np.float32(9)),
    }[kind]
    plain, searched = error_of(values, format_), error_of(values, replace(format_, search="mse"))
    assert np.all(searched <= plain * 1.0001)
    assert searched.sum() < plain.sum()


@pytest.mark.parametrize("search", ["none", "mse"])
@pytest.mark.parametrize("format_", FORMATS)
def test_pieces_and_single_rows_give_the_same_codes(
    format_: Blocks, search: blockwise.Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    format_, values = replace(format_, search=search), heavy(37, 128)
    whole = quantize(values, format_)
    monkeypatch.setattr(blockwise, "PIECE", 300)  # two rows, with a row left over
    in_pieces = quantize(values, format_)
    for start, stop in ((0, 1), (5, 11), (36, 37)):
        part = quantize(values[start:stop], format_)
        for got, pieces, want in zip(vars(part).values(), vars(in_pieces).values(), vars(whole).values(), strict=True):
            np.testing.assert_array_equal(got, want[start:stop])
            np.testing.assert_array_equal(pieces, want)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.25, 1e-45, -1e-40, 1e-31, 1e-20, 1e19, -1e30, 3e38, -3e38])
@pytest.mark.parametrize("search", ["none", "mse"])
@pytest.mark.parametrize("format_", FORMATS)
def test_a_block_of_one_value_is_finite_and_as_near_as_can_be(
    format_: Blocks, search: blockwise.Search, value: float
) -> None:
    values = np.full((2, format_.size), value, np.float32)
    found = quantize(values, replace(format_, search=search))
    assert np.isfinite(found.scales).all()
    assert found.scales.all()
    np.testing.assert_allclose(dequantize(found), values, rtol=1e-6, atol=1e-30)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("search", ["none", "mse"])
@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("size", [1e-33, 1e-20, 1e15, 1e30, 1.6e38])
def test_values_of_any_size_have_scales_of_that_size(format_: Blocks, search: blockwise.Search, size: float) -> None:
    values = np.clip(drawn(8, 64), -2, 2) * np.float32(size)
    found = quantize(values, replace(format_, search=search))
    got = dequantize(found)
    assert np.isfinite(found.scales).all()
    assert np.isfinite(got).all()
    assert np.abs(got - values).max() <= 2.1 * size / format_.middle + 1e-30


def test_zero_stays_zero_in_formats_with_zero_points() -> None:
    values = np.abs(drawn(16, 64)) + 1
    values[:, ::5] = 0
    for search in ("none", "mse"):
        got = dequantize(quantize(values, Blocks(4, 32, True, search)))
        assert not got[:, ::5].any()


@pytest.mark.parametrize("search", ["none", "mse"])
def test_zero_points_halve_the_error_of_values_of_one_sign(search: blockwise.Search) -> None:
    values = np.abs(drawn(32, 64))
    without, with_them = (error_of(values, Blocks(4, 32, zero_points, search)).sum() for zero_points in (False, True))
    assert with_them < 0.5 * without


@pytest.mark.parametrize(
    ("size", "columns", "fits"),
    [(32, 96, 32), (64, 96, 32), (128, 80, 16), (256, 4304, 16), (256, 256, 256), (64, 24, None), (16, 8, None)],
)
def test_the_block_that_fits_is_the_largest_half_that_divides_a_row(size: int, columns: int, fits: int | None) -> None:
    assert Blocks(4, size).fitting(columns) == fits


def test_no_block_is_smaller_than_the_kernels_know() -> None:
    assert Blocks(4, SMALLEST).fitting(SMALLEST) == SMALLEST
    assert Blocks(4, LARGEST_BLOCK).fitting(SMALLEST // 2 * 3) is None


def test_bits_a_weight_by_hand() -> None:
    assert Blocks(4, 32).bits_per_weight == 4 + 32 / 32
    assert Blocks(4, 64, zero_points=True).bits_per_weight == 4 + 36 / 64
    assert Blocks(8, 128, zero_points=True).bits_per_weight == 8 + 40 / 128


@pytest.mark.parametrize("zero_points", [False, True])
def test_eight_bits_have_a_sixteenth_of_the_error(zero_points: bool) -> None:
    values = heavy(64, 128)
    four, eight = (np.sqrt(error_of(values, Blocks(bits, 32, zero_points)).sum()) for bits in (4, 8))
    assert 14 < four / eight < 20


@pytest.mark.parametrize("zero_points", [False, True])
def test_important_columns_get_the_smaller_error(zero_points: bool) -> None:
    """The search minimizes the error with the weights that it is given."""
    values, format_ = heavy(256, 32), Blocks(4, 32, zero_points, "mse")
    importance = np.where(np.arange(32) < 4, np.float32(100), np.float32(1))

    def weighted(scale: Array, zero: Array) -> float:
        low, high = -zero, format_.top - zero
        codes = np.clip(np.rint(values / scale), low, high)
        return float((importance * (codes * scale - values) ** 2).sum())

    with_weights, without = weighted(*scales_of(values, format_, importance)), weighted(*scales_of(values, format_))
    alike = weighted(*scales_of(values, format_, np.full(32, 3, np.float32)))
    assert with_weights < 0.9 * without
    assert alike == pytest.approx(without, rel=1e-4)
