"""The catch table of a self-test in words.

In: `SelfTest.as_dict()`. Out: text, Markdown. Guaranteed: every mutant has a row, whatever became of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType

from builder.util.console_table import console_table

HEADINGS = ("mutant", "what is broken", "first difference", "figure", "limit", "")
GATES = ("gate", "what is scaled", "largest error that lives", "smallest that is caught")


def renderables(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Two tables for the console: the mutants, and what each gate lets live."""
    title = f"{found['target']} broken on purpose · {found['checkpoint']}"
    yield console_table(title, HEADINGS, _catches(found), right=("figure", "limit"))
    yield console_table("what each gate lets live", GATES, _survivors(found), right=GATES[2:])
    if found["bundle"]["first difference"]:
        yield f"the bundle itself fails: {found['bundle']['first difference']}"


def catch_markdown(found: Mapping[str, Any]) -> str:
    """The same as GitHub-flavoured tables."""
    return "\n\n".join([_marked(HEADINGS, _catches(found)), _marked(GATES, _survivors(found))])


def _catches(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for one in found["mutants"]:
        if one["place"] is None:
            where, figure, limit = one["detail"] or "none", "", ""
        else:
            where = f"{one['place']}: {one['case']}"
            figure, limit = _figure(one["measured"]), _figure(one["limit"])
        status = one["status"]
        if status not in ("caught", "does not apply"):
            status = f"{status.upper()}, expected {' or '.join(one['expected'])} {one['at']}".rstrip()
        rows.append((one["name"], one["what"], where, figure, limit, status))
    return rows


def _survivors(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            one["place"],
            one["what"],
            f"{one['passes']:.1e}",
            "NONE UP TO 1" if one["fails"] is None else f"{one['fails']:.1e}",
        )
        for one in found["survivors"]
    ]


def _marked(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def _figure(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.1e}" if 0 < abs(value) < 1e-2 else f"{value:.3g}" if value < 1e3 else f"{value:.0f}"
