"""A report for the console: a row a place, then what was not compared, then the failures."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType

from builder.util.console_table import console_table
from builder.util.text import clean, figure
from builder.verify.report.gates import PLACES, Report
from builder.verify.report.summary import failures, notes, places, unasked

HEADINGS = ("place", "", "cases", "worst", "limit", "at")
SHOWN = 8  # failures


def renderables(report: Report) -> Iterator[RenderableType]:
    """What `builder.util.console_table` prints or writes."""
    title = f"{report.target} against PyTorch · {clean(report.checkpoint)}"
    yield console_table(title, HEADINGS, _rows(report), right=("cases", "worst", "limit"))
    for what, why in report.not_run.items():
        if what not in PLACES:
            yield f"{what}: the rest not run: {clean(why)}"
    for case, checks in notes(report):
        yield f"case {clean(case)}: not compared, as its file requests: {checks}"
    for case, why in unasked(report):
        yield f"case {clean(case)}: {why}"
    for gate in failures(report)[:SHOWN]:
        yield f"{gate.place}: {clean(gate.case)}: {clean(gate.detail) or figure(gate.measured)}"


def _rows(report: Report) -> Iterator[tuple[str, ...]]:
    for place in places(report):
        if place.worst is not None:
            verdict = "pass" if place.ok else "FAIL"
            figures = f"{place.good}/{place.cases}", figure(place.worst.measured), figure(place.worst.limit)
            yield place.name, verdict, *figures, clean(place.worst.case)
        elif place.name in PLACES:
            yield place.name, "", "", "", "", f"not run: {clean(place.not_run)}"
