"""Render a report as GitHub-flavored Markdown for a comment on a pull request.

Guarantees: at most `MAX_CHARACTERS`, GitHub's limit for a comment; names are shown as code, so that none becomes a
link, a mention, a heading or HTML.
"""

from __future__ import annotations

from collections.abc import Sequence

from builder.util.text import code, figure
from builder.util.units import duration, size
from builder.verify.report.context import Context, Table
from builder.verify.report.gates import Report
from builder.verify.report.quality_tables import loss_tables
from builder.verify.report.summary import failures, headline, margin, measured, notes, places, skipped

MAX_CHARACTERS = 65_000
_SIGNS = {"passed": "✅", "partial": "✅", "failed": "❌"}


def markdown(report: Report, context: Context) -> str:
    """Return the comment; rows that do not fit are counted instead of listed."""
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
    rows += ["", *(f"Not compared, as the case requests: {code(a, 80)}: {code(b)}  " for a, b in notes(report))]
    rows += [f"{code(a, 80)}: {code(b)}  " for a, b in skipped(report)]
    return "\n".join(rows) + "\n\n"


def _details(report: Report, context: Context) -> list[tuple[str, list[str]]]:
    sections: list[tuple[str, list[str]]] = []
    failing = failures(report)
    if failing:
        rows = [f"- **{gate.place}**, {code(gate.case)}: {measured(gate)} {code(gate.detail, 300)}" for gate in failing]
        sections.append((f"What differs, in the order of the computation ({len(failing)})", rows))
    sections += [(table.title, _rows(table)) for table in loss_tables(report)]
    answers = [exhibit for exhibit in report.exhibits if exhibit.answers]
    if answers:
        rows = ["| case | prompt | PyTorch | here | |", "|---|---|---|---|---|"]
        rows += [
            f"| {code(x.case, 60)} | {code(x.prompt, 80)} | {' | '.join(code(text, 80) for text in x.answers)} "
            f"| {'equal' if x.answers[0] == x.answers[-1] else '**differs**'} |"
            for x in sorted(answers, key=lambda x: x.answers[0] == x.answers[-1])
        ]
        sections.append((f"Answers ({len(answers)})", rows))
    sections += [(f"Self-test: {code(table.title, 60)}", _rows(table)) for table in context.self_test]
    if context.stages:
        rows = ["| stage | time | peak memory |", "|---|--:|--:|"]
        rows += [
            f"| {stage.name} | {duration(stage.seconds)} | {'' if stage.memory is None else size(stage.memory)} |"
            for stage in context.stages
        ]
        sections.append(("Time and memory", rows))
    facts = [*context.facts, *((str(name), str(value)) for name, value in _versions(report))]
    if facts:
        sections.append(("Provenance", ["| | |", "|---|---|", *(f"| {code(a)} | {code(b)} |" for a, b in facts)]))
    return sections


def _versions(report: Report) -> list[tuple[str, object]]:
    versions = report.facts.get("versions")
    return list(versions.items()) if isinstance(versions, dict) else []


def _rows(table: Table) -> list[str]:
    head = ["| " + " | ".join(map(code, table.columns)) + " |", "|" + "---|" * len(table.columns)]
    return head + ["| " + " | ".join(code(cell, 120) for cell in row) + " |" for row in table.rows]


def _folded(title: str, rows: Sequence[str], room: int) -> str:
    """Return a collapsed section; rows that do not fit are counted."""
    begin, end = f"<details><summary>{title}</summary>\n\n", "\n\n</details>\n\n"
    left = room - len(begin) - len(end) - 60
    kept = 0
    while kept < len(rows) and left >= len(rows[kept]) + 1:
        left -= len(rows[kept]) + 1
        kept += 1
    more = [] if kept == len(rows) else ["", f"… and {len(rows) - kept} more, in report.html."]
    return begin + "\n".join([*rows[:kept], *more]) + end if kept else ""
