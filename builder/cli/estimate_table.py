"""The tables of `--dry-run`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType

from builder.util.console_table import console_table
from builder.util.units import duration, size

if TYPE_CHECKING:
    from builder.stages.engine.dry_run import Estimate
    from builder.stages.engine.estimate import GraphBytes


def renderables(estimate: Estimate) -> Iterator[RenderableType]:
    """Every figure, for the console."""
    if estimate.graphs:
        yield _graph_table(estimate.graphs)
    yield _stage_table(estimate)
    if estimate.download:
        fetched = f"{size(sum(estimate.download.values()))} in {len(estimate.download)} files"
        yield f"download  {fetched}; its time is not counted"
    for disk in estimate.disks:
        parts = " + ".join(f"{use} {size(count)}" for use, count in disk.uses.items())
        verdict = "TOO LITTLE" if disk.short else "fits"
        yield f"disk      {parts}; free under {disk.folder}: {size(disk.free)}: {verdict}"
    peak = estimate.largest[1].memory
    verdict = "TOO LITTLE" if peak > estimate.memory else "fits"
    yield f"memory    {size(peak)} at most; this process may use {size(estimate.memory)}: {verdict}"
    if any(step.stage.name == "verify" and step.state == "run" for step, _ in estimate.steps):
        yield f"verify    runs {estimate.mode}"


def _graph_table(graphs: Sequence[GraphBytes]) -> RenderableType:
    rows = []
    seen: set[str] = set()
    for row in graphs:
        shared = "linked" if row.data in seen else "shared"
        data_bytes = f"{row.data_bytes:,}" if row.data_bytes else shared
        rows.append((f"{row.target}/{row.graph}", size(row.graph_bytes), row.data, data_bytes))
        seen |= {row.data} if row.data_bytes else set()
    about, exactly = sum(row.graph_bytes for row in graphs), sum(row.data_bytes for row in graphs)
    rows.append(("all", size(about), "", f"{exactly:,}"))
    headings = ("graph", "about", "data file", "exactly")
    return console_table("to be written", headings, rows, right=("about", "exactly"))


def _stage_table(estimate: Estimate) -> RenderableType:
    rows = []
    for step, cost in estimate.steps:
        figures = (size(cost.written), size(cost.memory), duration(cost.seconds)) if step.state == "run" else ("",) * 3
        rows.append((step.stage.name, step.text, *figures))
    written = sum(cost.written for _, cost in estimate.steps)
    rows.append(("all", "", size(written), size(estimate.largest[1].memory), duration(estimate.seconds)))
    return console_table(
        "stages", ("stage", "state", "writes", "memory", "time"), rows, right=("writes", "memory", "time")
    )
