"""Compare an initializer of two graphs by its bytes and, where they differ, measure how far the values are apart.

At most `COUNT` values of each are in memory. Errors are computed in float64, relative to the standard deviation of the
first, as in `builder.verify.report.gates`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from builder.bundle.initializer import Initializer

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class WeightChange:
    """A weight that differs between two graphs.

    Args:
        graph: file of the graph.
        name: of the initializer or quantized matrix.
        digests: SHA-256 of the bytes, in hex; for a quantized matrix, of its codes.
        largest: largest absolute difference over the standard deviation of the first; None if not comparable.
        rms: RMS of the differences over the RMS of the first; None if not comparable.
    """

    graph: str
    name: str
    digests: tuple[str, str]
    largest: float | None
    rms: float | None


def compare_weights(graph: str, name: str, first: Initializer, second: Initializer) -> WeightChange | None:
    """Return how the initializers differ; None where type, shape and bytes are equal."""
    same = (first.tensor.data_type, list(first.tensor.dims)) == (second.tensor.data_type, list(second.tensor.dims))
    digests = first.digest(), second.digest()
    if same and digests[0] == digests[1]:
        return None
    if list(first.tensor.dims) != list(second.tensor.dims) or first.packed or second.packed:
        return WeightChange(graph, name, digests, None, None)
    return WeightChange(graph, name, digests, *errors(zip(first.values(), second.values(), strict=True)))


def errors(pairs: Iterable[tuple[Values, Values]]) -> tuple[float, float]:
    """Return (largest, rms) as in `WeightChange`.

    Infinite where a value is not finite on one side only, or where constant values differ.

    Args:
        pairs: blocks of values, (first, second).
    """
    count, total, squares, largest, difference = 0, 0.0, 0.0, 0.0, 0.0
    for a, b in pairs:
        with np.errstate(all="ignore"):
            distance = np.abs(a - b)
        distance[(a == b) | (np.isnan(a) & np.isnan(b))] = 0
        if not np.isfinite(distance).all():
            return math.inf, math.inf
        known = a[np.isfinite(a)]
        count, total, squares = count + known.size, total + known.sum(), squares + np.square(known).sum()
        largest, difference = (
            max(largest, float(distance.max(initial=0))),
            difference + float(np.square(distance).sum()),
        )
    if count == 0 or difference == 0:
        return 0.0, 0.0
    variance = squares / count - (total / count) ** 2
    spread = math.sqrt(variance) if variance > 0 else math.sqrt(squares / count)
    return _over(largest, spread), _over(math.sqrt(difference / count), math.sqrt(squares / count))


def _over(value: float, scale: float) -> float:
    return value / scale if scale > 0 else math.inf
