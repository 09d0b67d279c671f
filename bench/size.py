"""Everything that is measured at one size.

In: the name of a size and a folder to work in. Out: a `Result`. Guaranteed: at no time is more on the disk than the
checkpoint, one build and a second copy of its largest file; what is measured is removed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from bench import comparators
from bench.builds import build, data_files, seconds_in, stages
from bench.comparators import Copy, Decoder
from bench.measure import Run, typical
from bench.synthetic import is_whole, shapes, write_synthetic
from bench.table import UNKNOWN, Result, Row, copy_row, decoder_rows, megabytes, seconds, verify_rows
from builder.util.cost import Cost

GIGABYTE = 10**9
# What the figures must be: of the real sizes, in gigabytes, seconds and ratios.
PEAK, WRITING, TRACING = "≤ 1,500 MB", "≤ 1.5", "≤ 60 s"
# Our recipe of each, and what onnxruntime-genai's builder calls it.
DECODERS, CALIBRATED = {"fp32": "fp32", "int4-fast": "int4"}, "int4"
DECODER_WALL = {
    ("2b", "fp32"): "≤ 1.2",
    ("4b", "fp32"): "≤ 1.0",
    ("2b", "int4-fast"): "≤ 0.9",
    ("4b", "int4-fast"): "≤ 0.7",
}
VERIFY_GB = {"8b": 6}
VERIFY_GB_ELSE = 4


@dataclass(frozen=True)
class Asked:
    """What the command line asks for.

    Args:
        work: absolute; holds everything that is written.
        repeat: runs of what is timed; the full verification runs once.
        keep: leave checkpoint and build on the disk.
    """

    work: Path
    repeat: int
    keep: bool
    comparators: bool
    verify: bool
    say: Callable[[str], None] = print


def miniature(asked: Asked) -> Result:
    """The embedded checkpoint, built from nothing: what every build costs whatever the size."""
    output = asked.work / "miniature"
    until = () if asked.verify else ("--until", "configure")
    each = []
    for number in range(asked.repeat):
        asked.say(f"miniature: build {number + 1} of {asked.repeat}")
        shutil.rmtree(output, ignore_errors=True)
        if (done := build(None, output, *until)).failure:
            return Result("miniature", f"The build failed: {done.failure}", stages(output), ok=False)
        each.append(stages(output))
    shutil.rmtree(output)
    return Result("miniature", "The embedded checkpoint, built from nothing.", _medians(each))


def needed(folder: Path, size: str) -> tuple[int, int]:
    """Bytes of disk for the checkpoint (0 where it is there) and for a build of it."""
    elements = sum(map(prod, shapes(size).values()))
    return 0 if is_whole(folder / "checkpoint", size) else 2 * elements, 4 * elements


def measure(size: str, asked: Asked) -> Result:
    """Build, copy, verify and compare; a step that fails is a row, and the others go on as far as they can."""
    folder = asked.work / size
    _clear(folder)
    need, free = needed(folder, size), shutil.disk_usage(folder).free
    about = f"needs {need[0] / GIGABYTE:.1f} GB of disk for the checkpoint, {need[1] / GIGABYTE:.1f} GB for a build"
    asked.say(f"{size}: {about}; {free / GIGABYTE:.1f} GB are free")
    if sum(need) > free:
        return Result(size, f"Not run: {about}, and {free / GIGABYTE:.1f} GB were free.", {}, ok=False)
    checkpoint = write_synthetic(folder / "checkpoint", size)
    output = folder / "build"
    runs, each, copies = _builds(size, checkpoint, output, asked)
    if failure := runs[-1].failure:
        return Result(size, f"The build failed: {failure}", stages(output), ok=False)
    files = data_files(output)
    written = sum(file.stat().st_size for file in files)
    costs = _medians(each)
    rows = [
        copy_row(costs["quantize"].wall_s, written, copies, WRITING) if copies else None,
        Row("tracing all graphs", seconds(costs["export"].wall_s), wanted=TRACING),
        _second(checkpoint, folder / "second", asked),
    ]
    if asked.verify:
        verified, found = _verified(size, checkpoint, output, asked)
        costs |= {name: cost for name, cost in found.items() if name in ("verify", "bundle")}
        rows += verified
    if not asked.keep:
        shutil.rmtree(output)
    if asked.comparators:
        rows += _decoders(size, checkpoint, folder, asked)
    if not asked.keep:
        shutil.rmtree(folder)
    about = f"{megabytes(need[1] / 4)} million weights; runs: {asked.repeat}."
    return Result(size, about, costs, (_peak(costs, runs), *(row for row in rows if row)))


def _clear(folder: Path) -> None:
    """Leaves the checkpoint: a build beside the one that is measured would lend it what it has traced."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.iterdir():
        if left.is_dir() and left.name != "checkpoint":
            shutil.rmtree(left)
        elif left.is_file():
            left.unlink()


def _builds(
    size: str, checkpoint: Path, output: Path, asked: Asked
) -> tuple[list[Run], list[dict[str, Cost]], list[Copy]]:
    """Builds from nothing, a copy of the data files behind each; the last build stays."""
    runs: list[Run] = []
    each: list[dict[str, Cost]] = []
    copies: list[Copy] = []
    for number in range(asked.repeat):
        asked.say(f"{size}: build {number + 1} of {asked.repeat}")
        shutil.rmtree(output, ignore_errors=True)
        runs.append(build(checkpoint, output, "--until", "configure"))
        if runs[-1].failure:
            break
        each.append(stages(output))
        if asked.comparators:
            copies.append(comparators.copy(data_files(output), output.with_name("copy")))
    return runs, each, copies


def _medians(each: Sequence[Mapping[str, Cost]]) -> dict[str, Cost]:
    return {stage: typical(one[stage] for one in each) for stage in each[0]}


def _peak(costs: Mapping[str, Cost], runs: Sequence[Run]) -> Row:
    """The largest process of a build, by its records and from outside; `verify` has a row of its own."""
    seen = [cost.peak_rss or 0 for name, cost in costs.items() if name != "verify"]
    largest = max(*seen, *(run.cost.peak_rss or 0 for run in runs))
    last = next(reversed([name for name in costs if name != "verify"]))
    return Row(f"peak RSS of any process, fetch … {last}", f"{megabytes(largest)} MB", wanted=PEAK)


def _second(checkpoint: Path, output: Path, asked: Asked) -> Row:
    """Tracing in a build of the same architecture into another folder."""
    asked.say("a second build of the same architecture")
    done = build(checkpoint, output, "--until", "export")
    spent, state = seconds_in(done, "export")
    shutil.rmtree(output, ignore_errors=True)
    what = "tracing, second build of the architecture"
    if done.failure:
        return Row(what, UNKNOWN, wanted="0.0 s", note=done.failure)
    return Row(what, seconds(spent), wanted="0.0 s", note=state)


def _verified(size: str, checkpoint: Path, output: Path, asked: Asked) -> tuple[list[Row], dict[str, Cost]]:
    """Both targets verified in little memory; then the bundles, by a process of their own."""
    budget = VERIFY_GB.get(size, VERIFY_GB_ELSE)
    what = f"verify --memory {budget}GB, both targets"
    asked.say(f"{size}: {what}")
    done = build(checkpoint, output, "--until", "verify", "--memory", f"{budget}GB")
    if not done.failure:
        asked.say(f"{size}: bundle")
        bundled = build(checkpoint, output, "--memory", f"{budget}GB")
        done = replace(done, failure=bundled.failure)
    return verify_rows(what, done, f"≤ {budget},000 MB"), stages(output)


def _decoders(size: str, checkpoint: Path, folder: Path, asked: Asked) -> list[Row]:
    """Ours and theirs in turn: in fp32, and in 4 bits, of which a calibrated one is built once."""
    rows: list[Row] = []
    for recipe, precision in DECODERS.items():
        ours: list[Decoder] = []
        theirs: list[Decoder] = []
        for number in range(asked.repeat):
            asked.say(f"{size}: text decoder, {recipe} and onnxruntime-genai's, {number + 1} of {asked.repeat}")
            ours.append(comparators.ours(checkpoint, folder / "decoder", recipe))
            theirs.append(comparators.theirs(checkpoint, folder / "decoder", precision))
        rows += decoder_rows(recipe, ours, theirs, DECODER_WALL.get((size, recipe), ""))
    asked.say(f"{size}: text decoder, {CALIBRATED}")
    calibrated = comparators.ours(checkpoint, folder / "decoder", CALIBRATED)
    return rows + decoder_rows(CALIBRATED, [calibrated], theirs[:1], "")
