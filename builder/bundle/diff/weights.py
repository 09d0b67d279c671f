"""In: an initializer of two graphs, and the files that its values lie in. Out: whether the bytes are equal, and how far
apart the values are where they are not: a `WeightChange`.

Guaranteed: at most `COUNT` values of each are in memory; an error is taken in float64, in the first one's standard
deviations, as `builder.verify.report.gates` does.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx import TensorProto, numpy_helper

COUNT = 2**20  # values
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


@dataclass(frozen=True)
class Weight:
    """An initializer, and the folder of its graph."""

    tensor: TensorProto
    folder: Path

    @property
    def packed(self) -> bool:
        """Of less than a byte a value: int4."""
        return ir.DataType(self.tensor.data_type).bitwidth < 8

    def blocks(self) -> Iterator[bytes]:
        """Its bytes, `COUNT` values at a time."""
        if self.tensor.data_location != TensorProto.EXTERNAL:
            values = numpy_helper.to_array(self.tensor).reshape(-1)
            for begin in range(0, values.size, COUNT):
                yield values[begin : begin + COUNT].tobytes()
            return
        facts = {entry.key: entry.value for entry in self.tensor.external_data}
        bits = math.prod(self.tensor.dims) * ir.DataType(self.tensor.data_type).bitwidth
        left, most = -(-bits // 8), max(1, COUNT * ir.DataType(self.tensor.data_type).bitwidth // 8)
        with (self.folder / facts["location"]).open("rb") as file:
            file.seek(int(facts.get("offset", "0")))
            while left and (block := file.read(min(left, most))):
                left -= len(block)
                yield block

    def values(self) -> Iterator[Values]:
        """Its values, `COUNT` at a time."""
        kind: Any = ir.DataType(self.tensor.data_type).numpy()
        for block in self.blocks():
            with np.errstate(all="ignore"):
                values = np.frombuffer(block, kind).astype(np.float64)
            yield values

    def digest(self) -> str:
        """SHA-256 of its bytes."""
        found = hashlib.sha256()
        for block in self.blocks():
            found.update(block)
        return found.hexdigest()


def compare_weights(graph: str, name: str, one: Weight, other: Weight) -> WeightChange | None:
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
