"""What a report comes down to: a verdict in words, a row a place, margins.

In: a `Report`. Out: text and figures that every form of the report shows. Guaranteed: places in the order of the
computation, and in each the case with the least margin; text has no control or direction characters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from builder.util.text import figure
from builder.verify.report.gates import PLACES, Gate, Report


@dataclass(frozen=True)
class PlaceSummary:
    """One place of the computation.

    Args:
        name: one of `PLACES`, or of a case that was not run.
        good: how many cases hold.
        cases: how many there are; 0 where it was not run.
        worst: the gate with the least margin; None where it was not run.
        not_run: why; "" where it was.
    """

    name: str
    good: int
    cases: int
    worst: Gate | None
    not_run: str = ""

    @property
    def ok(self) -> bool:
        return self.good == self.cases


def places(report: Report) -> tuple[PlaceSummary, ...]:
    """Every place that was compared, or could not be; then the cases that could not be."""
    found = []
    for name in PLACES:
        gates = [gate for gate in report.gates if gate.place == name]
        if gates:
            worst = max(gates, key=lambda gate: (not gate.ok, gate.excess))
            found.append(PlaceSummary(name, sum(gate.ok for gate in gates), len(gates), worst))
        if name in report.not_run:
            found.append(PlaceSummary(name, 0, 0, None, report.not_run[name]))
    found += [PlaceSummary(name, 0, 0, None, why) for name, why in report.not_run.items() if name not in PLACES]
    return tuple(found)


def notes(report: Report) -> tuple[tuple[str, str], ...]:
    """(case, what its file says not to compare)."""
    found = report.facts.get("not checked")
    if not isinstance(found, dict):
        return ()
    return tuple(
        (str(name), ", ".join(map(str, one)) if isinstance(one, list) else str(one)) for name, one in found.items()
    )


def unasked(report: Report) -> tuple[tuple[str, str], ...]:
    """(case, why the runtime's own processor was not asked it)."""
    found = report.facts.get("not asked")
    return tuple((str(name), str(why)) for name, why in found.items()) if isinstance(found, dict) else ()


def failures(report: Report) -> tuple[Gate, ...]:
    """The gates that do not hold, in the order of the computation."""
    return tuple(sorted((gate for gate in report.gates if not gate.ok), key=lambda gate: PLACES.index(gate.place)))


def margin(gate: Gate) -> str:
    """How far from its limit: `16× below`, `130× over`, `exact`, `3 differ`, `not computed`."""
    if not math.isfinite(gate.measured):
        return "not comparable"
    if gate.limit == 0 or gate.place in ("tokens", "tokens of the runtime's pixels", "task"):
        return "exact" if gate.measured == 0 else f"{gate.measured:,.0f} differ"
    if gate.measured == 0:
        return "exact"
    ratio = gate.measured / gate.limit
    return f"{_times(1 / ratio)} below" if ratio <= 1 else f"{_times(ratio)} over"


def headline(report: Report) -> str:
    """The verdict in one sentence."""
    compared = f"{len(report.gates):,} comparisons"
    if report.verdict == "passed":
        return f"equals PyTorch: all {compared} hold"
    if report.verdict == "sliced":
        return f"equals PyTorch in all that was compared: {compared} hold; {len(report.not_run)} could not be run"
    if not report.gates:
        return "nothing was compared"
    return f"does not equal PyTorch: {len(failures(report)):,} of {compared} fail"


def measured(gate: Gate) -> str:
    """The figure with its limit, in words."""
    if gate.limit == 0:
        return "not comparable" if not math.isfinite(gate.measured) else f"{figure(gate.measured)} differ, none may"
    return f"{figure(gate.measured)}, limit {figure(gate.limit)} ({margin(gate)})"


def _times(ratio: float) -> str:
    if ratio >= 1e6:
        return f"{ratio:.0e}".replace("e+0", "e").replace("e+", "e") + "×"
    return f"{ratio:,.0f}×" if ratio >= 10 else f"{ratio:.1f}×"
