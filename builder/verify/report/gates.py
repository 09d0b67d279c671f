"""Gates and reports: measured figures with their limits, and the first place that differs.

Guarantees: a report without gates fails; `first_failure` is the earliest in the order of the computation.
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
# In the order of the computation: the first place that differs is where an error began.
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
    """One comparison with its limit.

    Example:
        >>> gate = Gate("embeddings", "one image", measured=3e-7, limit=1e-4)
        >>> gate.ok
        True

    Args:
        place: one of `PLACES`.
        case: what it was computed on.
        measured: an error, or the number of differing values in an exact comparison.
        limit: the largest value of `measured` that passes.
        detail: where and how it differs, for a person.
        layer: index of the decoder layer, vision block or DeepStack level; None if the place has none.

    Raises:
        ValueError: `place` is not one of `PLACES`.
    """

    place: str
    case: str
    measured: float
    limit: float
    detail: str = ""
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise ValueError(f"{self.place!r} is not a place of the computation, which are {', '.join(PLACES)}")

    @property
    def ok(self) -> bool:
        return math.isfinite(self.measured) and self.measured <= self.limit

    @property
    def excess(self) -> float:
        """`measured` relative to `limit`, by which gates are ranked; see `builder.bundle.evidence.excess`."""
        return excess(self.measured, self.limit)


@dataclass(frozen=True)
class Report:
    """All gates of one bundle.

    Args:
        not_run: place (or case) → why it could not be compared on this machine.
        exhibits: illustrations for the report's pages.
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
        """`failed`, `passed`, or `partial`: every comparison passed, and some could not be run."""
        return "failed" if not self.ok else "partial" if self.not_run else "passed"

    @property
    def first_failure(self) -> Gate | None:
        """The failing gate that is earliest in the order of the computation."""
        failing = [gate for gate in self.gates if not gate.ok]
        return min(failing, key=lambda gate: PLACES.index(gate.place), default=None)

    def as_dict(self) -> dict[str, Any]:
        """Return the content of parity.json; figures that are not finite become text."""
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
    """Return max |got - want| / std(want); infinite if shapes differ or a value is not finite."""
    if got.shape != want.shape or not np.isfinite(got).all():
        return math.inf
    if want.size == 0:
        return 0.0
    scale = float(want.std(dtype=np.float64)) or 1.0
    return float(np.abs(got.astype(np.float64) - want).max() / scale)


def compare_close(place: str, case: str, got: npt.NDArray[Any], want: npt.NDArray[Any], limit: float) -> Gate:
    """Return a gate on `relative_error`."""
    detail = f"shape {got.shape}, expected {want.shape}" if got.shape != want.shape else ""
    error = relative_error(got, want)
    if not detail and math.isfinite(error) and error > limit:
        at = tuple(int(i) for i in np.unravel_index(np.abs(got - want).argmax(), want.shape))
        detail = f"{error:.1e} of a standard deviation at {list(at)}: {got[at]:.6g}, PyTorch {want[at]:.6g}"
    return Gate(place, case, error, limit, detail)


def compare_exact(
    place: str, case: str, got: npt.NDArray[Any] | Sequence[Any], want: npt.NDArray[Any] | Sequence[Any]
) -> Gate:
    """Return a gate on the number of values that are not bitwise equal."""
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
    """Return `compute(*arguments)`, or a failing gate with the exception if it raises one."""
    return guarded_pair(place, case, lambda: (compute(*arguments), None), None)[0]


def guarded_pair(
    place: str, case: str, compute: Callable[..., tuple[list[Gate], T]], default: T, *arguments: Any
) -> tuple[list[Gate], T]:
    """Like `guarded`, for a `compute` with a second result, which is `default` if it raises."""
    try:
        return compute(*arguments)
    except BuildError:
        raise
    except Exception as error:  # each runtime raises its own exception types
        return [uncomputed(place, case, error)], default


def uncomputed(place: str, case: str, error: Exception) -> Gate:
    """Return the failing gate of a comparison that raised `error`."""
    first, *_ = str(error).splitlines() or [""]
    return Gate(place, case, math.inf, 0.0, f"{type(error).__name__}: {first}")


def _row(gate: Gate) -> dict[str, Any]:
    row = {**asdict(gate), "measured": _plain(gate.measured), "ok": gate.ok}
    return {key: value for key, value in row.items() if key != "layer" or value is not None}


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
