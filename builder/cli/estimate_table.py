"""Figures in words, and the tables of an estimate.

In: bytes, seconds, an `Estimate`. Out: text. Guaranteed: nothing is computed here that `--json` does not say.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from builder.util.units import duration, size

if TYPE_CHECKING:
    from builder.stages.engine.dry_run import Estimate
    from builder.stages.engine.estimate import GraphBytes

WIDTH = 120  # columns of a table


def tables(estimate: Estimate) -> str:
    """Every figure, for people."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, markup=False, emoji=False)
    if estimate.graphs:
        console.print(_graph_table(estimate.graphs))
    console.print(_stage_table(estimate))
    if estimate.download:
        fetched = f"{size(sum(estimate.download.values()))} in {len(estimate.download)} files"
        console.print(f"download  {fetched}; its time is not counted")
    for disk in estimate.disks:
        parts = " + ".join(f"{use} {size(count)}" for use, count in disk.uses.items())
        verdict = "TOO LITTLE" if disk.short else "fits"
        console.print(f"disk      {parts}; free under {disk.folder}: {size(disk.free)}: {verdict}", soft_wrap=True)
    peak = estimate.largest[1].memory
    verdict = "TOO LITTLE" if peak > estimate.memory else "fits"
    console.print(f"memory    {size(peak)} at most; this process may use {size(estimate.memory)}: {verdict}")
    if any(step.stage.name == "verify" and step.state == "run" for step, _ in estimate.steps):
        console.print(f"verify    runs {estimate.mode}")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()


def _graph_table(graphs: Sequence[GraphBytes]) -> Table:
    table = Table(title="to be written", title_justify="left")
    for heading, justify in (("graph", "left"), ("about", "right"), ("data file", "left"), ("exactly", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    seen: set[str] = set()
    for row in graphs:
        shared = "linked" if row.data in seen else "shared"
        table.add_row(
            f"{row.target}/{row.graph}",
            size(row.graph_bytes),
            row.data,
            f"{row.data_bytes:,}" if row.data_bytes else shared,
        )
        seen |= {row.data} if row.data_bytes else set()
    table.add_section()
    about, exactly = sum(row.graph_bytes for row in graphs), sum(row.data_bytes for row in graphs)
    table.add_row("all", size(about), "", f"{exactly:,}")
    return table


def _stage_table(estimate: Estimate) -> Table:
    table = Table(title="stages", title_justify="left")
    table.add_column("stage")
    table.add_column("state")
    for heading in ("writes", "memory", "time"):
        table.add_column(heading, justify="right")
    for step, cost in estimate.steps:
        figures = (size(cost.written), size(cost.memory), duration(cost.seconds)) if step.state == "run" else ("",) * 3
        table.add_row(step.stage.name, step.text, *figures)
    written = sum(cost.written for _, cost in estimate.steps)
    table.add_section()
    table.add_row("all", "", size(written), size(estimate.largest[1].memory), duration(estimate.seconds))
    return table
