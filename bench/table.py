"""Render measurements as Markdown.

A document names its machine and packages; sections of earlier runs are kept only if those are the same.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

from bench.comparators import Copy, Decoder
from bench.measure import Run, total, typical
from builder.util.cost import Cost

PACKAGES = ("qwen3vl-onnx", "torch", "transformers", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai")
UNKNOWN = "–"
EXPLAINED = """\
Written by `make bench`. Figures are medians over the runs, peaks are maxima; MB are 10⁶ bytes. Bytes read and written
are as requested from the system, cached or not. Weights are random, dimensions real; a build converts a bf16 checkpoint
to fp32, for both targets. The page cache is not dropped between runs, and the writes of a run are flushed before the
next run starts. Our builder flushes its output and onnxruntime-genai's does not: the rows "flushed" include flushing
for both."""


@dataclass(frozen=True)
class Row:
    """One of our figures, and the figure it is compared with; `wanted` bounds ours, or the ratio."""

    what: str
    ours: str
    other: str = ""
    ratio: str = ""
    wanted: str = ""
    note: str = ""


@dataclass(frozen=True)
class Result:
    """Measurements at one size: medians per stage, and further rows; `ok` is whether the build succeeded."""

    title: str
    about: str
    stages: Mapping[str, Cost]
    rows: tuple[Row, ...] = ()
    ok: bool = True


def section(result: Result) -> str:
    """Render `## title` and its tables."""
    parts = [f"## {result.title}", result.about]
    if result.stages:
        parts.append(stage_table(result.stages))
    if result.rows:
        parts.append(row_table(result.rows))
    return "\n\n".join(parts)


def stage_table(stages: Mapping[str, Cost]) -> str:
    """Render a line per stage, and a line for all of them except `verify`."""
    lines = ["| stage | wall s | CPU s | peak RSS MB | read MB | written MB |", "|---|--:|--:|--:|--:|--:|"]
    lines += [_stage(name, cost) for name, cost in stages.items()]
    rest = total(cost for name, cost in stages.items() if name != "verify")
    return "\n".join([*lines, _stage("**all but verify**" if "verify" in stages else "**all**", rest)])


def row_table(rows: Sequence[Row]) -> str:
    """Render the rows."""
    lines = ["| measured | ours | other | ratio | wanted | |", "|---|--:|--:|--:|--:|---|"]
    return "\n".join(lines + [_line(r.what, r.ours, r.other, r.ratio, r.wanted, r.note) for r in rows])


def copy_row(wall_s: float, written: int, copies: Sequence[Copy], wanted: str) -> Row:
    """Compare writing the weights with copying them.

    Args:
        wall_s: seconds of the stage that wrote them.
        written: bytes of its files.
    """
    what, ours = "writing the weights, compared with `cp` + fsync", seconds(wall_s)
    if failure := next((copy.failure for copy in copies if copy.failure), None):
        return Row(what, ours, UNKNOWN, UNKNOWN, wanted, failure)
    copy_s = median(copy.wall_s / copy.nbytes for copy in copies) * written
    copied = min(copy.nbytes for copy in copies)
    note = f"{megabytes(written)} MB"
    if copied != written:
        note += f"; the copy's figure is scaled from {megabytes(copied)} MB, for which the disk had room"
    return Row(what, ours, seconds(copy_s), ratio(wall_s, copy_s), wanted, note)


def decoder_rows(recipe: str, ours: Sequence[Decoder], theirs: Sequence[Decoder], wanted: str) -> list[Row]:
    """Compare the text decoder alone with onnxruntime-genai's builder; a failure of either is the row's note."""
    sides = {"ours": ours, "onnxruntime-genai": theirs}
    failures = [
        f"{name}: {decoder.run.failure}" for name, side in sides.items() for decoder in side if decoder.run.failure
    ]
    note = "; ".join(dict.fromkeys(failures))
    walls, flushed, peaks = [], [], []
    for side in sides.values():
        built = [decoder for decoder in side if decoder.run.failure is None]
        walls.append(typical(decoder.run.cost for decoder in built).wall_s if built else None)
        flushed.append(median(decoder.flushed_s for decoder in built) if built else None)
        # The peak of a failed run is a result too.
        peaks.append(max((decoder.run.cost.peak_rss or 0 for decoder in side), default=0) or None)
    sizes = " and ".join(f"{megabytes(max((built.nbytes for built in side), default=0))} MB" for side in sides.values())
    return [
        Row(f"text decoder alone, {recipe}, wall", *_pair(walls, seconds), wanted, note or sizes),
        Row(f"text decoder alone, {recipe}, flushed", *_pair(flushed, seconds), "", note),
        Row(f"text decoder alone, {recipe}, peak RSS", *_pair(peaks, lambda value: f"{megabytes(value)} MB"), "", note),
    ]


def verify_rows(what: str, checked: Run, wanted: str) -> list[Row]:
    """Render seconds and memory of a verification, as notes if it failed."""
    wall, peak = seconds(checked.cost.wall_s), f"{megabytes(checked.cost.peak_rss or 0)} MB"
    note = ""
    if checked.failure is not None:
        note, wall, peak = f"{checked.failure} (after {wall}, at {peak})", UNKNOWN, UNKNOWN
    return [
        Row(f"{what}, wall", wall, note=note),
        Row(f"{what}, peak RSS of any process", peak, wanted=wanted, note=note),
    ]


def document(sections: Mapping[str, str], file: Path) -> str:
    """Render the head and all sections: the given ones, and those in `file` from the same machine and packages."""
    kept: dict[str, str] = {}
    head = _head()
    if file.is_file() and (old := file.read_text(encoding="utf-8")).startswith(head):
        for part in re.split(r"^(?=## )", old.removeprefix(head), flags=re.MULTILINE)[1:]:
            kept[part.splitlines()[0].removeprefix("## ")] = part.rstrip("\n")
    # A remeasured section keeps its place.
    return head + "\n" + "\n\n".join({**kept, **sections}.values()) + "\n"


def seconds(value: float) -> str:
    """`12.3 s`."""
    return f"{value:,.1f} s"


def megabytes(value: float) -> str:
    """`1,234`: units of 10⁶ bytes."""
    return f"{value / 1e6:,.0f}"


def ratio(ours: float, other: float) -> str:
    """`1.25`."""
    return f"{ours / other:.2f}" if other else UNKNOWN


def _pair(values: Sequence[float | None], text: Callable[[float], str]) -> tuple[str, str, str]:
    """Render ours, theirs, and the ratio, where known."""
    ours, other = values
    shown = [UNKNOWN if value is None else text(value) for value in values]
    return shown[0], shown[1], UNKNOWN if ours is None or other is None else ratio(ours, other)


def _stage(name: str, cost: Cost) -> str:
    moved = [UNKNOWN if value is None else megabytes(value) for value in (cost.peak_rss, cost.read, cost.written)]
    return _line(name, f"{cost.wall_s:,.1f}", f"{cost.cpu_s:,.1f}", *moved)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _head() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    machine = f"{os.cpu_count()} CPUs, {memory:.0f} GiB of memory, {platform.system()} {platform.machine()}"
    return f"# What a build costs\n\n{machine}, Python {platform.python_version()}; {packages}.\n\n{EXPLAINED}\n"
