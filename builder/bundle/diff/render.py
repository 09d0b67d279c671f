"""Render a `Difference` as tables for a terminal, or as Markdown for a pull request.

Only differences are listed. Long lists are cut, with a count of the omitted rows (`--json` has all). Names are escaped.
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
    """A table of differences."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def renderables(found: Difference) -> Iterator[RenderableType]:
    """Yield the headline and tables for the console."""
    yield headline(found)
    for section in sections(found):
        rows = ([cut(clean(cell), CELL) for cell in row] for row in section.rows[:ROWS])
        yield console_table(section.title, section.columns, rows)
        if len(section.rows) > ROWS:
            yield f"… and {len(section.rows) - ROWS:,} more; --json has all"


def markdown(found: Difference) -> str:
    """Return Markdown for a pull request."""
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
    """Summarize the difference in one sentence."""
    if found.equal:
        return f"The bundles are equal; {found.compared:,} weights compared."
    parts = {
        "facts": len(found.facts),
        "graphs": len(found.graphs),
        "weights": len(found.weights),
        "settings": sum(map(len, found.settings.values())),
        "other files": len(found.files),
    }
    counts = ", ".join(f"{count:,} {what}" for what, count in parts.items() if count)
    return f"The bundles differ in {counts}; {found.compared:,} weights compared."


def sections(found: Difference) -> tuple[Section, ...]:
    """Return a table for each kind of difference, and for the measurements."""
    sides = ("first", "second")
    tables = [
        Section("Built from and with", ("fact", *sides), _rows(found.facts)),
        Section("Graphs", ("graph", "what", *sides), _graph_rows(found.graphs)),
        Section("Weights", ("graph", "weight", "largest error", "RMS error"), _weight_rows(found)),
        Section(
            "Settings",
            ("file", "key", *sides),
            tuple((name, *row) for name, pairs in found.settings.items() for row in _rows(pairs)),
        ),
        Section("Other files", ("file", "what"), tuple(found.files.items())),
        Section("Measured (not counted as a difference)", ("place", *sides), _rows(found.quality)),
    ]
    return tuple(table for table in tables if table.rows)


def _rows(pairs: Mapping[str, Pair]) -> tuple[tuple[str, ...], ...]:
    return tuple((name, _text(a), _text(b)) for name, (a, b) in pairs.items())


def _graph_rows(graphs: Mapping[str, GraphChange]) -> tuple[tuple[str, ...], ...]:
    return tuple(row for name, change in graphs.items() for row in _change_rows(name, change))


def _change_rows(name: str, change: GraphChange) -> Iterable[tuple[str, ...]]:
    for kind, word in GRAPH.items():
        for what, (a, b) in getattr(change, kind).items():
            yield name, f"{word} {what}", _text(a), _text(b)
    if change.constants:
        yield name, "unnamed constants", *(f"{count} not in the other" for count in change.constants)
    elif change.other and not (change.operators or change.ports or change.opsets or change.initializers):
        yield name, "nodes", "the same operators", "different edges, names or attributes"


def _weight_rows(found: Difference) -> tuple[tuple[str, ...], ...]:
    worst = sorted(found.weights, key=lambda change: -math.inf if change.largest is None else -change.largest)
    return tuple((change.graph, change.name, _error(change.largest), _error(change.rms)) for change in worst)


def _error(value: float | None) -> str:
    return "not comparable" if value is None else figure(value)


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return figure(value)
    return str(value)
