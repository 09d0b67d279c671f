"""Render the results of a self-test, from `SelfTest.as_dict()`, as console tables and Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType

from builder.util.console_table import console_table

HEADINGS = ("mutant", "what is broken", "first difference", "figure", "limit", "")
GATES = ("gate", "what is scaled", "largest error that passes", "smallest that is caught")


def renderables(results: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield two tables for the console: the mutants, and the threshold of each gate."""
    title = f"{results['target']} broken on purpose · {results['checkpoint']}"
    yield console_table(title, HEADINGS, _catches(results), right=("figure", "limit"))
    yield console_table("threshold of each gate", GATES, _thresholds(results), right=GATES[2:])
    if results["bundle"]["first difference"]:
        yield f"the bundle itself fails: {results['bundle']['first difference']}"


def catch_markdown(results: Mapping[str, Any]) -> str:
    """Return both tables as GitHub-flavored Markdown."""
    return "\n\n".join([_marked(HEADINGS, _catches(results)), _marked(GATES, _thresholds(results))])


def _catches(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for mutant in results["mutants"]:
        if mutant["place"] is None:
            where, figure, limit = mutant["detail"] or "none", "", ""
        else:
            where = f"{mutant['place']}: {mutant['case']}"
            figure, limit = _figure(mutant["measured"]), _figure(mutant["limit"])
        status = mutant["status"]
        if status not in ("caught", "does not apply"):
            status = f"{status.upper()}, expected {' or '.join(mutant['expected'])} {mutant['at']}".rstrip()
        rows.append((mutant["name"], mutant["what"], where, figure, limit, status))
    return rows


def _thresholds(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            threshold["place"],
            threshold["what"],
            f"{threshold['passes']:.1e}",
            "NONE UP TO 1" if threshold["fails"] is None else f"{threshold['fails']:.1e}",
        )
        for threshold in results["survivors"]
    ]


def _marked(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def _figure(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.1e}" if 0 < abs(value) < 1e-2 else f"{value:.3g}" if value < 1e3 else f"{value:.0f}"
