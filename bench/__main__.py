"""`python -m bench`: what a build costs at the real sizes, beside other ways to do the same.

In: names of sizes. Out: a table a size, on stdout and in docs/bench.md. Guaranteed: a size that does not fit the disk,
or a build that fails, is said and the next one is measured; then the exit code is 1.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from bench.measure import ROOT
from bench.size import Asked, measure, miniature
from bench.synthetic import SIZES
from bench.table import Result, document, section

DOCUMENT = ROOT / "docs" / "bench.md"


def _known(names: list[str]) -> list[str]:
    if unknown := [name for name in names if name not in SIZES]:
        raise typer.BadParameter(f"no size is called {unknown[0]!r}; they are: {', '.join(SIZES)}")
    return names


def main(
    size: Annotated[list[str], typer.Option(help="What to measure; repeatable.", callback=_known)] = ["2b", "4b"],  # noqa: B006
    work: Annotated[Path, typer.Option(help="Takes checkpoints and builds.")] = ROOT / "outputs" / "bench",
    repeat: Annotated[int, typer.Option(min=1, help="Runs of what is timed.")] = 3,
    keep: Annotated[bool, typer.Option("--keep", help="Leave checkpoints and builds in the work folder.")] = False,
    skip_comparators: Annotated[bool, typer.Option("--skip-comparators")] = False,
    skip_verify: Annotated[bool, typer.Option("--skip-verify")] = False,
) -> None:
    """Build synthetic checkpoints of real dimensions; measure time, memory and bytes, and what others need."""
    work.mkdir(parents=True, exist_ok=True)
    asked = Asked(work.resolve(), repeat, keep, not skip_comparators, not skip_verify, _say)
    DOCUMENT.parent.mkdir(exist_ok=True)
    failed = False
    for result in _results(size, asked):
        failed |= not result.ok
        text = section(result)
        # Written at once: a later size may take an hour, or the machine with it.
        DOCUMENT.write_text(document({result.title: text}, DOCUMENT), encoding="utf-8")
        Console().print(Markdown(text))
    raise typer.Exit(int(failed))


def _results(sizes: list[str], asked: Asked) -> Iterator[Result]:
    yield miniature(asked)
    for size in sizes:
        yield measure(size, asked)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
