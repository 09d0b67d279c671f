"""In: an initializer of two graphs, and the files that its values lie in. Out: whether the bytes are equal, and how far
apart the values are where they are not: a `WeightChange`.

Guaranteed: at most `COUNT` values of each are in memory; an error is taken in float64, in the first one's standard
deviations, as `builder.verify.report.gates` does.
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
    """Two weights of one name, or equal ones of two.

    Args:
        graph, name: whose initializer, or quantized matrix.
        digests: SHA-256 of the bytes, in hex; of a quantized matrix those of its levels.
        largest: the largest absolute difference over the first one's standard deviation.
        rms: the root mean square of the differences over that of the first one's values.
    """

    graph: str
    name: str
    digests: tuple[str, str]
    largest: float | None
    rms: float | None


def compare_weights(graph: str, name: str, one: Initializer, other: Initializer) -> WeightChange | None:
    """How they differ; None where type, shape and bytes are equal."""
    same = (one.tensor.data_type, list(one.tensor.dims)) == (other.tensor.data_type, list(other.tensor.dims))
    digests = one.digest(), other.digest()
    if same and digests[0] == digests[1]:
        return None
    if list(one.tensor.dims) != list(other.tensor.dims) or one.packed or other.packed:
        return WeightChange(graph, name, digests, None, None)
    return WeightChange(graph, name, digests, *errors(zip(one.values(), other.values(), strict=True)))


def errors(pairs: Iterable[tuple[Values, Values]]) -> tuple[float, float]:
    """(largest, rms); infinite where a value is not finite on one side only, or differs from no spread at all.

    Args:
        pairs: values of the one and of the other, piece by piece.
    """
    count, total, squares, largest, difference = 0, 0.0, 0.0, 0.0, 0.0
    for a, b in pairs:
        with np.errstate(all="ignore"):
            apart = np.abs(a - b)
        apart[(a == b) | (np.isnan(a) & np.isnan(b))] = 0
        if not np.isfinite(apart).all():
            return math.inf, math.inf
        known = a[np.isfinite(a)]
        count, total, squares = count + known.size, total + known.sum(), squares + np.square(known).sum()
        largest, difference = max(largest, float(apart.max(initial=0))), difference + float(np.square(apart).sum())
    if count == 0 or difference == 0:
        return 0.0, 0.0
    variance = squares / count - (total / count) ** 2
    spread = math.sqrt(variance) if variance > 0 else math.sqrt(squares / count)
    return _over(largest, spread), _over(math.sqrt(difference / count), math.sqrt(squares / count))


def _over(value: float, scale: float) -> float:
    return value / scale if scale > 0 else math.inf
