"""In: what was measured. Out: Markdown.

Guaranteed: a document says on what machine it was measured; sections of another run stay in it only where that was the
same one.
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
Written by `make bench`. Figures are medians, peaks the highest of all runs; MB are 10⁶ bytes. Bytes read and written
are those that were asked of the system, whether its cache had them or not. Weights are random, dimensions real; a
build goes from a bf16 checkpoint to fp32, for both targets. Nothing is dropped from the page cache between runs, and
what a run wrote is on the disk before the next one starts. onnxruntime-genai's builder does not flush what it wrote,
ours does: in the rows "flushed" both are on the disk."""


@dataclass(frozen=True)
class Row:
    """One figure of ours, and what it stands beside; `wanted` is the bound on ours, or on the ratio."""

    what: str
    ours: str
    beside: str = ""
    ratio: str = ""
    wanted: str = ""
    note: str = ""


@dataclass(frozen=True)
class Result:
    """What was measured at one size: medians a stage, and rows beside them; `ok` is whether the build succeeded."""

    title: str
    about: str
    stages: Mapping[str, Cost]
    rows: tuple[Row, ...] = ()
    ok: bool = True


def section(result: Result) -> str:
    """`## title` and its tables."""
    parts = [f"## {result.title}", result.about]
    if result.stages:
        parts.append(stage_table(result.stages))
    if result.rows:
        parts.append(row_table(result.rows))
    return "\n\n".join(parts)


def stage_table(stages: Mapping[str, Cost]) -> str:
    """A line a stage, and one for all of them but `verify`."""
    lines = ["| stage | wall s | CPU s | peak RSS MB | read MB | written MB |", "|---|--:|--:|--:|--:|--:|"]
    lines += [_stage(name, cost) for name, cost in stages.items()]
    rest = total(cost for name, cost in stages.items() if name != "verify")
    return "\n".join([*lines, _stage("**all but verify**" if "verify" in stages else "**all**", rest)])


def row_table(rows: Sequence[Row]) -> str:
    """The rows, as they are."""
    lines = ["| measured | ours | beside it | ratio | wanted | |", "|---|--:|--:|--:|--:|---|"]
    return "\n".join(lines + [_line(r.what, r.ours, r.beside, r.ratio, r.wanted, r.note) for r in rows])


def copy_row(wall_s: float, written: int, copies: Sequence[Copy], wanted: str) -> Row:
    """Writing the weights, beside a copy of them.

    Args:
        wall_s: of the stage that wrote them, seconds.
        written: bytes of the files that it wrote.
    """
    what, ours = "writing the weights, beside `cp` + fsync", seconds(wall_s)
    if failure := next((one.failure for one in copies if one.failure), None):
        return Row(what, ours, UNKNOWN, UNKNOWN, wanted, failure)
    as_many = median(one.wall_s / one.nbytes for one in copies) * written
    copied = min(one.nbytes for one in copies)
    note = f"{megabytes(written)} MB"
    if copied != written:
        note += f"; the copy's figure is that of {megabytes(copied)} MB, for which the disk had room, scaled"
    return Row(what, ours, seconds(as_many), ratio(wall_s, as_many), wanted, note)


def decoder_rows(recipe: str, ours: Sequence[Decoder], theirs: Sequence[Decoder], wanted: str) -> list[Row]:
    """The text decoder alone, beside onnxruntime-genai's builder; a failure of either is the row's note."""
    sides = {"ours": ours, "onnxruntime-genai": theirs}
    failures = [f"{name}: {one.run.failure}" for name, side in sides.items() for one in side if one.run.failure]
    note = "; ".join(dict.fromkeys(failures))
    walls, flushed, peaks = [], [], []
    for side in sides.values():
        whole = [one for one in side if one.run.failure is None]
        cost = typical(one.run.cost for one in whole) if whole else None
        walls.append(cost.wall_s if cost else None)
        flushed.append(median(one.flushed_s for one in whole) if whole else None)
        # How far one that failed had come is a result too.
        peaks.append(max((one.run.cost.peak_rss or 0 for one in side), default=0) or None)
    sizes = " and ".join(f"{megabytes(max((one.nbytes for one in side), default=0))} MB" for side in sides.values())
    return [
        Row(f"text decoder alone, {recipe}, wall", *_pair(walls, seconds), wanted, note or sizes),
        Row(f"text decoder alone, {recipe}, flushed", *_pair(flushed, seconds), "", note),
        Row(f"text decoder alone, {recipe}, peak RSS", *_pair(peaks, lambda value: f"{megabytes(value)} MB"), "", note),
    ]


def verify_rows(what: str, checked: Run, wanted: str) -> list[Row]:
    """Seconds and memory of a verification; of one that failed, how far it came."""
    wall, peak = seconds(checked.cost.wall_s), f"{megabytes(checked.cost.peak_rss or 0)} MB"
    note = ""
    if checked.failure is not None:
        note, wall, peak = f"{checked.failure} (after {wall}, at {peak})", UNKNOWN, UNKNOWN
    return [
        Row(f"{what}, wall", wall, note=note),
        Row(f"{what}, peak RSS of any process", peak, wanted=wanted, note=note),
    ]


def document(sections: Mapping[str, str], file: Path) -> str:
    """The head and every section: those given, and those that `file` has from the same machine and packages."""
    kept: dict[str, str] = {}
    head = _head()
    if file.is_file() and (old := file.read_text(encoding="utf-8")).startswith(head):
        for part in re.split(r"^(?=## )", old.removeprefix(head), flags=re.MULTILINE)[1:]:
            kept[part.splitlines()[0].removeprefix("## ")] = part.rstrip("\n")
    # A section that is measured again keeps its place.
    return head + "\n" + "\n\n".join({**kept, **sections}.values()) + "\n"


def seconds(value: float) -> str:
    """`12.3 s`."""
    return f"{value:,.1f} s"


def megabytes(value: float) -> str:
    """`1,234`: of 10⁶ bytes."""
    return f"{value / 1e6:,.0f}"


def ratio(ours: float, other: float) -> str:
    """`1.25`."""
    return f"{ours / other:.2f}" if other else UNKNOWN


def _pair(values: Sequence[float | None], text: Callable[[float], str]) -> tuple[str, str, str]:
    """Ours, theirs, and the ratio, as far as they are known."""
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
