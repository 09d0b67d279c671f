"""Markdown for a comment on a pull request.

In: a `Report` and its `Context`. Out: GitHub-flavoured Markdown: the verdict, a table of places, the first difference,
details that unfold. Guaranteed: at most `MAX_CHARACTERS`, which is what GitHub takes; names are shown as code, so that
no name becomes a link, a mention, a heading or HTML.
"""

from __future__ import annotations

from collections.abc import Sequence

from builder.util.text import code, figure
from builder.util.units import duration, size
from builder.verify.report.context import Context, Table
from builder.verify.report.gates import Report
from builder.verify.report.quality_tables import loss_tables
from builder.verify.report.summary import failures, headline, margin, measured, notes, places, unasked

MAX_CHARACTERS = 65_000
_SIGNS = {"passed": "✅", "sliced": "✅", "failed": "❌"}


def markdown(report: Report, context: Context) -> str:
    """The comment; what does not fit is counted instead of listed."""
    head = _head(report) + _table(report)
    room = MAX_CHARACTERS - len(head) - 200
    parts: list[str] = []
    for title, rows in _details(report, context):
        text = _folded(title, rows, room)
        parts.append(text)
        room -= len(text)
    return head + "".join(parts)


def _head(report: Report) -> str:
    lines = [
        f"### {_SIGNS[report.verdict]} {code(report.target)} of {code(report.checkpoint)}: {report.verdict.upper()}",
        "",
        headline(report)[0].upper() + headline(report)[1:] + ".",
        "",
    ]
    first = report.first_failure
    if first is not None:
        lines += [
            f"**First difference: {first.place}**, {code(first.case)}: {measured(first)}",
            "",
            *([f"> {code(first.detail, 400)}", ""] if first.detail else []),
        ]
    return "\n".join(lines) + "\n"


def _table(report: Report) -> str:
    rows = ["| | place | cases | worst | limit | margin | at |", "|---|---|--:|--:|--:|--:|---|"]
    for place in places(report):
        if place.worst is None:
            rows.append(f"| ⏭️ | {code(place.name, 80)} | | | | not run | {code(place.not_run)} |")
            continue
        gate = place.worst
        rows.append(
            f"| {'✅' if place.ok else '❌'} | {place.name} | {place.good}/{place.cases} | {figure(gate.measured)} "
            f"| {figure(gate.limit)} | {margin(gate)} | {code(gate.case, 80)} |"
        )
    rows += ["", *(f"Not compared, by the case's own choice: {code(a, 80)}: {code(b)}  " for a, b in notes(report))]
    rows += [f"{code(a, 80)}: {code(b)}  " for a, b in unasked(report)]
    return "\n".join(rows) + "\n\n"


def _details(report: Report, context: Context) -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []
    failing = failures(report)
    if failing:
        rows = [f"- **{one.place}**, {code(one.case)}: {measured(one)} {code(one.detail, 300)}" for one in failing]
        found.append((f"What differs, in the order of the computation ({len(failing)})", rows))
    found += [(table.title, _rows(table)) for table in loss_tables(report)]
    answers = [one for one in report.exhibits if one.answers]
    if answers:
        rows = ["| case | prompt | PyTorch | here | |", "|---|---|---|---|---|"]
        rows += [
            f"| {code(one.case, 60)} | {code(one.prompt, 80)} | {' | '.join(code(text, 80) for text in one.answers)} "
            f"| {'equal' if one.answers[0] == one.answers[-1] else '**differs**'} |"
            for one in sorted(answers, key=lambda one: one.answers[0] == one.answers[-1])
        ]
        found.append((f"Answers ({len(answers)})", rows))
    found += [(f"Self-test: {code(table.title, 60)}", _rows(table)) for table in context.self_test]
    if context.stages:
        rows = ["| stage | time | memory at the peak |", "|---|--:|--:|"]
        rows += [
            f"| {one.name} | {duration(one.seconds)} | {'' if one.memory is None else size(one.memory)} |"
            for one in context.stages
        ]
        found.append(("Time and memory", rows))
    told = [*context.facts, *((str(name), str(value)) for name, value in _versions(report))]
    if told:
        found.append(("Provenance", ["| | |", "|---|---|", *(f"| {code(a)} | {code(b)} |" for a, b in told)]))
    return found


def _versions(report: Report) -> list[tuple[str, object]]:
    versions = report.facts.get("versions")
    return list(versions.items()) if isinstance(versions, dict) else []


def _rows(table: Table) -> list[str]:
    head = ["| " + " | ".join(code(one) for one in table.columns) + " |", "|" + "---|" * len(table.columns)]
    return head + ["| " + " | ".join(code(cell, 120) for cell in row) + " |" for row in table.rows]


def _folded(title: str, rows: Sequence[str], room: int) -> str:
    """A section that unfolds; rows that do not fit are counted."""
    begin, end = f"<details><summary>{title}</summary>\n\n", "\n\n</details>\n\n"
    left = room - len(begin) - len(end) - 60
    kept = 0
    while kept < len(rows) and left >= len(rows[kept]) + 1:
        left -= len(rows[kept]) + 1
        kept += 1
    more = [] if kept == len(rows) else ["", f"… and {len(rows) - kept} more, in report.html."]
    return begin + "\n".join([*rows[:kept], *more]) + end if kept else ""
