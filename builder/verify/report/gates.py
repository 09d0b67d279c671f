"""What a verification found: gates, their margins, the first place that differs.

In: measured figures with their limits, in the order in which the model computes. Out: a `Report`, as a table and JSON.
Guaranteed: a report without gates does not pass; the first failure named is the earliest stage of the computation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from builder.bundle.evidence import excess
from builder.util.errors import BuildError

if TYPE_CHECKING:
    from builder.verify.report.exhibits import Exhibit

T = TypeVar("T")
FORMAT = 2  # of parity.json, see builder/verify/report/schema.json
# The order in which a wrong value travels: what differs first is where it began.
PLACES = (
    "decoded image",
    "pixel values",
    "token ids",
    "position ids",
    "runtime's pixel values",
    "image preprocessor",
    "weights",
    "vision layers",
    "image features",
    "deepstack features",
    "embeddings",
    "decoder layers",
    "decoder prefill",
    "decoder chunk",
    "decoder step",
    "tokens",
    "tokens of the runtime's pixels",
    "KL divergence",
    "top-1 disagreement",
    "perplexity",
    "generated tokens",
    "held-out accuracy",
)


@dataclass(frozen=True)
class Gate:
    """One comparison.

    Args:
        place: one of `PLACES`.
        case: what it was computed on.
        measured: the figure; for exact comparisons the number of values that differ.
        limit: the largest figure that passes.
        detail: what a person needs to see where and how it differs.
        layer: index of the decoder layer, vision block or DeepStack level; None where the place has none.
    """

    place: str
    case: str
    measured: float
    limit: float
    detail: str = ""
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise ValueError(f"{self.place!r} is no place of the computation: one of {', '.join(PLACES)}")

    @property
    def ok(self) -> bool:
        return math.isfinite(self.measured) and self.measured <= self.limit

    @property
    def excess(self) -> float:
        """By which gates are ranked, see `builder.bundle.evidence.excess`."""
        return excess(self.measured, self.limit)


@dataclass(frozen=True)
class Report:
    """All gates of one bundle.

    `not_run` says, of each place (or case) that could not be compared on this machine, why; `exhibits` are for people
    to look at.
    """

    target: str
    checkpoint: str
    gates: tuple[Gate, ...]
    facts: dict[str, Any]
    not_run: Mapping[str, str] = field(default_factory=dict)
    exhibits: tuple[Exhibit, ...] = ()

    @property
    def ok(self) -> bool:
        return bool(self.gates) and all(gate.ok for gate in self.gates)

    @property
    def verdict(self) -> str:
        """`failed`; `passed`; or `partial`: all that was compared holds, and something could not be."""
        return "failed" if not self.ok else "partial" if self.not_run else "passed"

    @property
    def first_failure(self) -> Gate | None:
        """The failing gate that comes first in the order of the computation."""
        failing = [gate for gate in self.gates if not gate.ok]
        return min(failing, key=lambda gate: PLACES.index(gate.place), default=None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers stay numbers; a figure that is no number is written as text."""
        first = self.first_failure
        return {
            "format": FORMAT,
            "target": self.target,
            "checkpoint": self.checkpoint,
            "verdict": self.verdict,
            "first difference": None if first is None else f"{first.place}: {first.case}",
            "not run": dict(self.not_run),
            "gates": [_row(gate) for gate in self.gates],
            "facts": self.facts,
        }


def relative_error(got: npt.NDArray[Any], want: npt.NDArray[Any]) -> float:
    """max |got - want| over the standard deviation of `want`; infinite where shapes differ or a value is not finite."""
    if got.shape != want.shape or not np.isfinite(got).all():
        return math.inf
    if want.size == 0:
        return 0.0
    scale = float(want.std(dtype=np.float64)) or 1.0
    return float(np.abs(got.astype(np.float64) - want).max() / scale)


def compare_close(place: str, case: str, got: npt.NDArray[Any], want: npt.NDArray[Any], limit: float) -> Gate:
    """A gate on `relative_error`."""
    detail = f"shape {got.shape}, expected {want.shape}" if got.shape != want.shape else ""
    error = relative_error(got, want)
    if not detail and math.isfinite(error) and error > limit:
        at = tuple(int(i) for i in np.unravel_index(np.abs(got - want).argmax(), want.shape))
        detail = f"{error:.1e} of a standard deviation at {list(at)}: {got[at]:.6g}, PyTorch {want[at]:.6g}"
    return Gate(place, case, error, limit, detail)


def compare_exact(
    place: str, case: str, got: npt.NDArray[Any] | Sequence[Any], want: npt.NDArray[Any] | Sequence[Any]
) -> Gate:
    """A gate on the number of values that differ, bit for bit."""
    a, b = np.asarray(got), np.asarray(want)
    if a.shape != b.shape:
        return Gate(place, case, float(max(a.size, b.size, 1)), 0.0, f"shape {a.shape}, expected {b.shape}")
    if a.dtype != b.dtype:
        return Gate(place, case, float(max(a.size, 1)), 0.0, f"type {a.dtype}, expected {b.dtype}")
    bits = f"u{a.dtype.itemsize}"  # 0.0 and -0.0 are equal numbers of different bits
    differ = (a != b) | (np.ascontiguousarray(a).view(bits) != np.ascontiguousarray(b).view(bits))
    if not differ.any():
        return Gate(place, case, 0.0, 0.0)
    at = tuple(int(i) for i in np.argwhere(differ)[0])
    return Gate(place, case, float(differ.sum()), 0.0, f"first at {list(at)}: {a[at]}, expected {b[at]}")


def guarded(place: str, case: str, compute: Callable[..., list[Gate]], *arguments: Any) -> list[Gate]:
    """The gates that `compute(*arguments)` gives, or one that fails and says why there are none."""
    return guarded_pair(place, case, lambda: (compute(*arguments), None), None)[0]


def guarded_pair(
    place: str, case: str, compute: Callable[..., tuple[list[Gate], T]], default: T, *arguments: Any
) -> tuple[list[Gate], T]:
    """As `guarded`, where `compute` gives a result besides; `default` where it fails."""
    try:
        return compute(*arguments)
    except BuildError:
        raise
    except Exception as error:  # each runtime throws errors of its own for what its graphs cannot take
        return [uncomputed(place, case, error)], default


def uncomputed(place: str, case: str, error: Exception) -> Gate:
    """The gate of a comparison that `error` has ended."""
    first, *_ = str(error).splitlines() or [""]
    return Gate(place, case, math.inf, 0.0, f"{type(error).__name__}: {first}")


def _row(gate: Gate) -> dict[str, Any]:
    row = {**asdict(gate), "measured": _plain(gate.measured), "ok": gate.ok}
    return {key: value for key, value in row.items() if key != "layer" or value is not None}


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
