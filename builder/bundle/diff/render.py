"""In: a `Difference`. Out: tables for a terminal, or Markdown for a pull request.

Guaranteed: both say the same; only what differs is shown, and what was compared is counted; a list that is too long
says how much is left out (`--json` has it); names are shown as text, in Markdown as code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType

from builder.bundle.diff.diff import Difference
from builder.bundle.diff.graphs import GraphChange, Pair
from builder.util.console_table import console_table
from builder.util.text import clean, code, cut, figure

ROWS = 30  # of a table
CELL = 100  # characters
GRAPH = {"opsets": "opset", "operators": "operator", "ports": "port", "initializers": "initializer"}


@dataclass(frozen=True)
class Section:
    """A table of what differs."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def renderables(found: Difference) -> Iterator[RenderableType]:
    """For the console."""
    yield headline(found)
    for section in sections(found):
        rows = ([cut(clean(cell), CELL) for cell in row] for row in section.rows[:ROWS])
        yield console_table(section.title, section.columns, rows)
        if len(section.rows) > ROWS:
            yield f"… and {len(section.rows) - ROWS:,} more; --json has all"


def markdown(found: Difference) -> str:
    """For a pull request."""
    lines = [f"### {headline(found)}", "", f"{code(found.bundles[0])} → {code(found.bundles[1])}", ""]
    for section in sections(found):
        lines += [
            f"#### {section.title}",
            "",
            f"| {' | '.join(section.columns)} |",
            "|---" * len(section.columns) + "|",
        ]
        lines += [f"| {' | '.join(code(cell, CELL) for cell in row)} |" for row in section.rows[:ROWS]]
        lines += [f"\n… and {len(section.rows) - ROWS:,} more."] if len(section.rows) > ROWS else []
        lines.append("")
    return "\n".join(lines)


def headline(found: Difference) -> str:
    """What it comes down to, in one sentence."""
    if found.equal:
        return f"The bundles are equal; {found.compared:,} weights compared."
    parts = {
        "facts": len(found.facts),
        "graphs": len(found.graphs),
        "weights": len(found.weights),
        "settings": sum(map(len, found.settings.values())),
        "other files": len(found.files),
    }
    told = ", ".join(f"{count:,} {what}" for what, count in parts.items() if count)
    return f"The bundles differ in {told}; {found.compared:,} weights compared."


def sections(found: Difference) -> tuple[Section, ...]:
    """A table of every kind in which they differ, and of what was measured."""
    sides = ("first", "second")
    tables = [
        Section("Built from and with", ("fact", *sides), _rows(found.facts)),
        Section("Graphs", ("graph", "what", *sides), _graph_rows(found.graphs)),
        Section("Weights", ("graph", "weight", "largest error", "RMS error"), _weight_rows(found)),
        Section(
            "Settings",
            ("file", "key", *sides),
            tuple((name, *row) for name, one in found.settings.items() for row in _rows(one)),
        ),
        Section("Other files", ("file", "what"), tuple(found.files.items())),
        Section("Measured (makes no difference)", ("place", *sides), _rows(found.quality)),
    ]
    return tuple(one for one in tables if one.rows)


def _rows(pairs: Mapping[str, Pair]) -> tuple[tuple[str, ...], ...]:
    return tuple((name, _said(a), _said(b)) for name, (a, b) in pairs.items())


def _graph_rows(graphs: Mapping[str, GraphChange]) -> tuple[tuple[str, ...], ...]:
    return tuple(row for name, change in graphs.items() for row in _change_rows(name, change))


def _change_rows(name: str, change: GraphChange) -> Iterable[tuple[str, ...]]:
    for kind, word in GRAPH.items():
        for what, (a, b) in getattr(change, kind).items():
            yield name, f"{word} {what}", _said(a), _said(b)
    if change.constants:
        yield name, "unnamed constants", *(f"{count} that the other lacks" for count in change.constants)
    elif change.other and not (change.operators or change.ports or change.opsets or change.initializers):
        yield name, "nodes", "the same operators", "joined, named or set otherwise"


def _weight_rows(found: Difference) -> tuple[tuple[str, ...], ...]:
    worst = sorted(found.weights, key=lambda one: -math.inf if one.largest is None else -one.largest)
    return tuple((one.graph, one.name, _error(one.largest), _error(one.rms)) for one in worst)


def _error(value: float | None) -> str:
    return "not comparable" if value is None else figure(value)


def _said(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return figure(value)
    return str(value)
