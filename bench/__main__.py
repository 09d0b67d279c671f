"""Measure what a build costs at real sizes, compared with other exporters: `python -m bench`.

Prints a table per size and writes it to docs/bench.md. A size that does not fit on the disk, or whose build fails, is
reported and the next size is measured; the exit code is then 1.
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
from bench.size import Options, measure, miniature
from bench.synthetic import SIZES
from bench.table import Result, document, section

DOCUMENT = ROOT / "docs" / "bench.md"


def _known(names: list[str]) -> list[str]:
    if unknown := [name for name in names if name not in SIZES]:
        raise typer.BadParameter(f"unknown size {unknown[0]!r}; expected one of: {', '.join(SIZES)}")
    return names


def main(
    size: Annotated[list[str], typer.Option(help="What to measure; repeatable.", callback=_known)] = ["2b", "4b"],  # noqa: B006
    work: Annotated[Path, typer.Option(help="Folder for checkpoints and builds.")] = ROOT / "outputs" / "bench",
    repeat: Annotated[int, typer.Option(min=1, help="Number of timed runs.")] = 3,
    keep: Annotated[bool, typer.Option("--keep", help="Leave checkpoints and builds in the work folder.")] = False,
    skip_comparators: Annotated[bool, typer.Option("--skip-comparators")] = False,
    skip_verify: Annotated[bool, typer.Option("--skip-verify")] = False,
) -> None:
    """Build synthetic checkpoints of real dimensions; measure time, memory and bytes, and those of other exporters."""
    work.mkdir(parents=True, exist_ok=True)
    options = Options(work.resolve(), repeat, keep, not skip_comparators, not skip_verify, _log)
    DOCUMENT.parent.mkdir(exist_ok=True)
    failed = False
    for result in _results(size, options):
        failed |= not result.ok
        text = section(result)
        # Written after every size: a later one may take an hour, or crash the machine.
        DOCUMENT.write_text(document({result.title: text}, DOCUMENT), encoding="utf-8")
        Console().print(Markdown(text))
    raise typer.Exit(int(failed))


def _results(sizes: list[str], options: Options) -> Iterator[Result]:
    yield miniature(options)
    for size in sizes:
        yield measure(size, options)


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
