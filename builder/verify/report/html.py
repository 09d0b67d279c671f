"""Render a report as one self-contained HTML page.

Guarantees: no scripts, no external resources (enforced by a content security policy), and all text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from builder.util.text import clean, cut, figure
from builder.util.units import duration, size
from builder.verify.report.context import Context, MeasuredStage, Table
from builder.verify.report.exhibits import Exhibit
from builder.verify.report.gates import PLACES, Gate, Report
from builder.verify.report.plots import error_plot, histogram, scatter
from builder.verify.report.quality_tables import loss_tables
from builder.verify.report.summary import failures, headline, margin, measured, notes, places, skipped

FOLDER = Path(__file__).parent
SHOWN = 48  # exhibits with an answer; those that differ come first
FOLDED = 9  # held-out questions shown before the rest is collapsed; those that differ are always shown
LISTED = 3  # failing gates per place
LIMIT_AT = 70.0  # position of the limit in a bar, in percent of its width
DECADES_BELOW, DECADES_OVER = 4.0, 3.0  # shown by a bar on either side of the limit
_VERDICTS = {"passed": ("✓", "Passed"), "partial": ("✓", "Passed, in part"), "failed": ("✗", "Failed")}


@dataclass(frozen=True)
class Tile:
    """A key figure at the top of the page."""

    value: str
    label: str


@dataclass(frozen=True)
class Bar:
    """The cost of a stage; `width` is in percent of the largest."""

    words: str
    width: float


def html(report: Report, context: Context) -> str:
    """Return the page."""
    glyph, verdict = _VERDICTS[report.verdict]
    failing = failures(report)
    cases, tasks = _shown(report.exhibits, "case"), _shown(report.exhibits, "task")
    return _template().render(
        style=Markup((FOLDER / "style.css").read_text(encoding="utf-8")),
        report=report,
        context=context,
        glyph=glyph,
        verdict=verdict,
        headline=headline(report),
        tiles=_tiles(report),
        places=places(report),
        notes=notes(report),
        skipped=skipped(report),
        bar=bar,
        limit_at=LIMIT_AT,
        failing=(listed := _first_of_each(failing)),
        further=len(failing) - len(listed),
        listed=[(place, [gate for gate in report.gates if gate.place == place]) for place in PLACES],
        wide=error_plot(report),
        plots=(scatter(report.exhibits), histogram(report.exhibits)),
        stages=_stages(context.stages),
        total=duration(sum(stage.seconds for stage in context.stages)),
        cases=cases,
        tasks=tasks,
        folded=max(FOLDED, sum(map(differs, tasks))),
        left_out=len(report.exhibits) - len(cases) - len(tasks),
        facts=_facts(report, context),
        tables=_tables(report, context),
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters.update(figure=figure, margin=margin, measured=measured, cut=cut)
    return environment.get_template("template.html.j2")


def bar(gate: Gate) -> float:
    """Return the length of a margin's bar in percent: logarithmic, with the limit at `LIMIT_AT`."""
    over = gate.excess
    if over == 0:
        return 0.0
    if math.isinf(over):
        return 100.0
    decades = math.log10(over)
    if decades <= 0:
        return max(2.0, LIMIT_AT * (1 + decades / DECADES_BELOW))
    return min(100.0, LIMIT_AT + (100 - LIMIT_AT) * decades / DECADES_OVER)


def _tiles(report: Report) -> list[Tile]:
    good = sum(gate.ok for gate in report.gates)
    tiles = [Tile(f"{good:,} / {len(report.gates):,}", "comparisons pass")]
    close = [gate for gate in report.gates if gate.limit > 0 and gate.measured > 0 and gate.case != "near ties"]
    if close:
        worst = max(close, key=lambda gate: gate.excess)
        tiles.append(
            Tile(margin(worst), f"{'closest to its limit' if worst.ok else 'furthest over its limit'}: {worst.place}")
        )
    tokens = [gate for gate in report.gates if gate.place.startswith("tokens") and gate.case != "near ties"]
    if tokens:
        tiles.append(Tile(f"{sum(gate.ok for gate in tokens)} / {len(tokens)}", "answers equal, token by token"))
    task = report.facts.get("task")
    if isinstance(task, dict):
        tiles.append(Tile(" · ".join(str(value) for value in task.values()), f"correct answers: {' · '.join(task)}"))
    if report.not_run:
        tiles.append(Tile(f"{len(report.not_run)}", "places not run"))
    return tiles


def _first_of_each(failing: Sequence[Gate]) -> list[Gate]:
    """Return the first `LISTED` gates of every place."""
    kept: dict[str, list[Gate]] = {}
    for gate in failing:
        kept.setdefault(gate.place, []).append(gate)
    return [gate for gates in kept.values() for gate in gates[:LISTED]]


def _stages(stages: Sequence[MeasuredStage]) -> list[tuple[str, Bar, Bar | None]]:
    longest = max((stage.seconds for stage in stages), default=0) or 1.0
    largest = max((stage.memory or 0 for stage in stages), default=0) or 1
    return [
        (
            stage.name,
            Bar(_seconds(stage.seconds), 100 * stage.seconds / longest),
            None if stage.memory is None else Bar(size(stage.memory), 100 * stage.memory / largest),
        )
        for stage in stages
    ]


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


def _shown(exhibits: Sequence[Exhibit], kind: str) -> list[Exhibit]:
    of_kind = [exhibit for exhibit in exhibits if exhibit.kind == kind]
    return sorted(of_kind, key=lambda exhibit: not differs(exhibit))[:SHOWN]


def differs(exhibit: Exhibit) -> bool:
    """Return whether the two answers differ."""
    return bool(exhibit.answers) and exhibit.answers[0] != exhibit.answers[-1]


def _facts(report: Report, context: Context) -> list[tuple[str, str]]:
    facts = list(context.facts) or [("checkpoint", report.checkpoint), ("target", report.target)]
    peak = report.facts.get("peak_rss")
    return facts + ([("memory of the verification", size(peak))] if isinstance(peak, int) else [])


def _tables(report: Report, context: Context) -> list[Table]:
    versions = report.facts.get("versions")
    rows = tuple((str(a), str(b)) for a, b in versions.items()) if isinstance(versions, dict) else ()
    verified = [Table("Verified with", ("package", "version"), rows)] if rows else []
    return [*loss_tables(report), *verified, *context.tables]
