"""Tables for the console, and for text files of any width."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

GOOD, BAD = "green", "bold red"
STYLES = {"pass": GOOD, "caught": GOOD, "fits": GOOD, "FAIL": BAD, "SURVIVED": BAD, "MISPLACED": BAD, "TOO": BAD}
WIDEST = 10_000  # columns of a file: no cell is cut or folded


def console_table(
    title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[str] = ()
) -> Table:
    """Return a table that is readable at 80 columns: long cells are folded, never cut.

    Args:
        right: headings of the right-aligned columns, i.e. of numbers.
    """
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        if heading in right:
            table.add_column(heading, justify="right", no_wrap=True)
        else:
            table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row))
    return table


def show(*parts: RenderableType) -> None:
    """Print tables and unfolded sentences to stdout.

    The width is the terminal's (80 columns without a terminal); colours are off if `NO_COLOR` is set or stdout is not
    a terminal.
    """
    _print(Console(markup=False, emoji=False, highlight=False), parts)


def as_text(*parts: RenderableType) -> str:
    """Return the same as text for a file: no colours, as wide as the longest row."""
    file = io.StringIO()
    _print(Console(file=file, width=WIDEST, color_system=None, markup=False, emoji=False, highlight=False), parts)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _print(console: Console, parts: Iterable[RenderableType]) -> None:
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def _cell(text: str) -> Text:
    """Colour a cell that begins with a verdict."""
    first, *_ = text.replace(",", " ").split() or [""]
    return Text(text, STYLES.get(first, "") if first.isupper() or text == first else "")
