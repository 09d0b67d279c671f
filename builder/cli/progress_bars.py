"""Progress on stderr: one line per stage, with a spinner and bars on a terminal.

stdout is left to results: its last line is the path of a bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from builder.stages.engine.build import Build
from builder.stages.engine.execute import Event, Step
from builder.stages.engine.output_folder import Record
from builder.util.progress import Advance, use_display


def line(build: Build, step: Step, record: Record | None = None) -> str:
    """`3-export     run: first time … 12.3 s, 610 MB`; cached stages have no cost."""
    text = f"{build.folder(step.stage.name).name:<12} {step.text}"
    if record is None or step.state == "cached":
        return text
    cost = record.cost
    memory = "" if cost.peak_rss is None else f", {cost.peak_rss / 1e6:,.0f} MB"
    return f"{text} … {cost.wall_s:.1f} s{memory}"


@contextmanager
def watching(build: Build) -> Iterator[Callable[[Event], None]]:
    """Show the events of `execute`, and every `progress` inside a stage."""
    console = Console(stderr=True)

    def write(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if not console.is_terminal:
        yield lambda event: write(line(build, event.step, event.record)) if event.record else None
        return
    with _bars(console) as bars:
        running = bars.add_task("", visible=False, total=None)

        def on_event(event: Event) -> None:
            bars.reset(running, description=line(build, event.step), visible=event.record is None, total=None)
            if event.record is not None:
                write(line(build, event.step, event.record))

        with use_display(lambda label, total: _bar(bars, label, total)):
            yield on_event


@contextmanager
def bars() -> Iterator[None]:
    """Show every `progress` inside on stderr."""
    with _bars(Console(stderr=True)) as shown, use_display(lambda label, total: _bar(shown, label, total)):
        yield


def _bars(console: Console) -> Bars:
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=24))
    return Bars(*columns, MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True)


@contextmanager
def _bar(bars: Bars, label: str, total: int | None) -> Iterator[Advance]:
    task = bars.add_task(f"  {label}", total=total)
    try:
        yield lambda steps=1: bars.advance(task, steps)
    finally:
        bars.remove_task(task)
