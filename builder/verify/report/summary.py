"""Summarize a report for all of its forms: the verdict in words, one row per place, margins."""

from __future__ import annotations

import math
from dataclasses import dataclass

from builder.util.text import figure
from builder.verify.report.gates import PLACES, Gate, Report


@dataclass(frozen=True)
class PlaceSummary:
    """One place of the computation.

    Args:
        name: one of `PLACES`, or the name of a case that was not run.
        good: number of gates that pass.
        cases: number of gates; 0 if not run.
        worst: the gate that is closest to its limit, or furthest over it; None if not run.
        not_run: why it was not run; "" if it was.
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
    """Return every place that was compared or could not be, then the cases that could not be."""
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
    """Return (case, the checks that its file leaves out)."""
    checks = report.facts.get("not checked")
    if not isinstance(checks, dict):
        return ()
    return tuple((str(case), ", ".join(map(str, x)) if isinstance(x, list) else str(x)) for case, x in checks.items())


def skipped(report: Report) -> tuple[tuple[str, str], ...]:
    """Return (case, why it was not run through the runtime's own processor)."""
    cases = report.facts.get("skipped")
    return tuple((str(name), str(why)) for name, why in cases.items()) if isinstance(cases, dict) else ()


def failures(report: Report) -> tuple[Gate, ...]:
    """Return the failing gates in the order of the computation."""
    return tuple(sorted((gate for gate in report.gates if not gate.ok), key=lambda gate: PLACES.index(gate.place)))


def margin(gate: Gate) -> str:
    """Format the distance from the limit: `16× below`, `130× over`, `exact`, `3 differ`, `not comparable`."""
    if not math.isfinite(gate.measured):
        return "not comparable"
    if gate.limit == 0 or gate.place in ("tokens", "tokens of the runtime's pixels", "held-out accuracy"):
        return "exact" if gate.measured == 0 else f"{gate.measured:,.0f} differ"
    if gate.measured == 0:
        return "exact"
    ratio = gate.measured / gate.limit
    return f"{_times(1 / ratio)} below" if ratio <= 1 else f"{_times(ratio)} over"


def headline(report: Report) -> str:
    """Return the verdict as a sentence without its period."""
    compared = f"{len(report.gates):,} comparisons"
    if report.verdict == "passed":
        return f"equals PyTorch: all {compared} pass"
    if report.verdict == "partial":
        return f"equals PyTorch where it was compared: all {compared} pass; {len(report.not_run)} could not be run"
    if not report.gates:
        return "nothing was compared"
    return f"does not equal PyTorch: {len(failures(report)):,} of {compared} fail"


def measured(gate: Gate) -> str:
    """Format the measured figure with its limit."""
    if gate.limit == 0:
        return "not comparable" if not math.isfinite(gate.measured) else f"{figure(gate.measured)} differ, none may"
    return f"{figure(gate.measured)}, limit {figure(gate.limit)} ({margin(gate)})"


def _times(ratio: float) -> str:
    if ratio >= 1e6:
        return f"{ratio:.0e}".replace("e+0", "e").replace("e+", "e") + "×"
    return f"{ratio:,.0f}×" if ratio >= 10 else f"{ratio:.1f}×"
