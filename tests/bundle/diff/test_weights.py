"""Errors of weights: streamed in blocks, equal to numpy's errors of the complete tensors."""

from __future__ import annotations

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from builder.bundle.diff.weights import compare_weights
from builder.bundle.initializer import COUNT, Initializer


def weight(folder: Path, values: np.ndarray) -> Initializer:
    """In an external file."""
    tensor = numpy_helper.from_array(values, "w")
    path = folder / f"{len(list(folder.iterdir()))}.data"
    path.write_bytes(b"\0" * 16 + tensor.raw_data)
    onnx.external_data_helper.set_external_data(tensor, path.name, offset=16, length=len(tensor.raw_data))
    tensor.ClearField("raw_data")
    return Initializer(tensor, folder)


def errors(folder: Path, one: np.ndarray, other: np.ndarray) -> tuple[float | None, float | None] | None:
    found = compare_weights("g", "w", weight(folder, one), weight(folder, other))
    return None if found is None else (found.largest, found.rms)


def test_errors_in_blocks_equal_those_of_the_complete_tensor(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0)
    a = drawn.standard_normal(2 * COUNT + 3, np.float32)
    b = a + np.float32(1e-3) * drawn.standard_normal(a.size, np.float32)
    wide, narrow = a.astype(np.float64), b.astype(np.float64)
    found = errors(tmp_path, a, b)
    assert found is not None
    assert found[0] == pytest.approx(np.abs(wide - narrow).max() / wide.std())
    assert found[1] == pytest.approx(np.sqrt(np.square(wide - narrow).mean() / np.square(wide).mean()))
    assert errors(tmp_path, a, a.copy()) is None
    half = errors(tmp_path, a, a.astype(ml_dtypes.bfloat16))
    assert half is not None
    assert 1e-4 < (half[1] or 0) < 1e-2


def test_values_that_are_not_finite_are_an_error_only_on_one_side(tmp_path: Path) -> None:
    a = np.array([1.0, np.nan, np.inf, 2.0], np.float32)
    b = np.array([1.0, np.nan, np.inf, 2.5], np.float32)
    found = errors(tmp_path, a, b)
    assert found is not None
    assert found[0] == pytest.approx(1.0)
    assert errors(tmp_path, a, np.array([1, np.nan, 0, 2], np.float32)) == (math.inf, math.inf)
    assert errors(tmp_path, np.zeros(3, np.float32), np.ones(3, np.float32)) == (math.inf, math.inf)


def test_incomparable_weights_have_no_error(tmp_path: Path) -> None:
    assert errors(tmp_path, np.ones(3, np.float32), np.ones(4, np.float32)) == (None, None)
    four = np.ones(5, ml_dtypes.int4)
    assert errors(tmp_path, four, four.copy()) is None
    assert errors(tmp_path, four, np.zeros(5, ml_dtypes.int4)) == (None, None)
