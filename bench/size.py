"""Measure everything at one size.

At most the checkpoint, one build and a second copy of its largest file are on the disk at a time.
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
from bench.synthetic import is_complete, shapes, write_synthetic
from bench.table import UNKNOWN, Result, Row, copy_row, decoder_rows, megabytes, seconds, verify_rows
from builder.util.cost import Cost

GIGABYTE = 10**9
# Required figures at the real sizes.
PEAK, WRITING, TRACING = "≤ 1,500 MB", "≤ 1.5", "≤ 60 s"
# Our recipes, and the precision of onnxruntime-genai's builder that each is compared with.
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
class Options:
    """Options of the command line.

    Args:
        work: absolute path of the folder for everything that is written.
        repeat: number of timed runs; the full verification runs once.
        keep: leave checkpoint and build on the disk.
    """

    work: Path
    repeat: int
    keep: bool
    comparators: bool
    verify: bool
    log: Callable[[str], None] = print


def miniature(options: Options) -> Result:
    """Measure a build of the embedded checkpoint from scratch: the cost that does not depend on the size."""
    output = options.work / "miniature"
    until = () if options.verify else ("--until", "configure")
    each = []
    for number in range(options.repeat):
        options.log(f"miniature: build {number + 1} of {options.repeat}")
        shutil.rmtree(output, ignore_errors=True)
        if (done := build(None, output, *until)).failure:
            return Result("miniature", f"The build failed: {done.failure}", stages(output), ok=False)
        each.append(stages(output))
    shutil.rmtree(output)
    return Result("miniature", "The embedded checkpoint, built from scratch.", _medians(each))


def needed(folder: Path, size: str) -> tuple[int, int]:
    """Return the bytes of disk for the checkpoint (0 if it exists) and for a build of it."""
    elements = sum(map(prod, shapes(size).values()))
    return 0 if is_complete(folder / "checkpoint", size) else 2 * elements, 4 * elements


def measure(size: str, options: Options) -> Result:
    """Build, copy, verify and compare; a failed step is a row, and the remaining steps still run."""
    folder = options.work / size
    _clear(folder)
    need, free = needed(folder, size), shutil.disk_usage(folder).free
    about = f"needs {need[0] / GIGABYTE:.1f} GB of disk for the checkpoint, {need[1] / GIGABYTE:.1f} GB for a build"
    options.log(f"{size}: {about}; {free / GIGABYTE:.1f} GB free")
    if sum(need) > free:
        return Result(size, f"Not run: {about}, and {free / GIGABYTE:.1f} GB were free.", {}, ok=False)
    checkpoint = write_synthetic(folder / "checkpoint", size)
    output = folder / "build"
    runs, each, copies = _builds(size, checkpoint, output, options)
    if failure := runs[-1].failure:
        return Result(size, f"The build failed: {failure}", stages(output), ok=False)
    files = data_files(output)
    written = sum(file.stat().st_size for file in files)
    costs = _medians(each)
    rows = [
        copy_row(costs["quantize"].wall_s, written, copies, WRITING) if copies else None,
        Row("tracing all graphs", seconds(costs["export"].wall_s), wanted=TRACING),
        _second(checkpoint, folder / "second", options),
    ]
    if options.verify:
        verified, stage_costs = _verified(size, checkpoint, output, options)
        costs |= {name: cost for name, cost in stage_costs.items() if name in ("verify", "bundle")}
        rows += verified
    if not options.keep:
        shutil.rmtree(output)
    if options.comparators:
        rows += _decoders(size, checkpoint, folder, options)
    if not options.keep:
        shutil.rmtree(folder)
    about = f"{megabytes(need[1] / 4)} million weights; runs: {options.repeat}."
    return Result(size, about, costs, (_peak(costs, runs), *(row for row in rows if row)))


def _clear(folder: Path) -> None:
    """Remove all but the checkpoint: a neighbouring build would lend its traced graphs to the measured one."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.iterdir():
        if left.is_dir() and left.name != "checkpoint":
            shutil.rmtree(left)
        elif left.is_file():
            left.unlink()


def _builds(
    size: str, checkpoint: Path, output: Path, options: Options
) -> tuple[list[Run], list[dict[str, Cost]], list[Copy]]:
    """Build from scratch and copy the data files, `repeat` times; the last build is kept."""
    runs: list[Run] = []
    each: list[dict[str, Cost]] = []
    copies: list[Copy] = []
    for number in range(options.repeat):
        options.log(f"{size}: build {number + 1} of {options.repeat}")
        shutil.rmtree(output, ignore_errors=True)
        runs.append(build(checkpoint, output, "--until", "configure"))
        if runs[-1].failure:
            break
        each.append(stages(output))
        if options.comparators:
            copies.append(comparators.copy(data_files(output), output.with_name("copy")))
    return runs, each, copies


def _medians(each: Sequence[Mapping[str, Cost]]) -> dict[str, Cost]:
    return {stage: typical(costs[stage] for costs in each) for stage in each[0]}


def _peak(costs: Mapping[str, Cost], runs: Sequence[Run]) -> Row:
    """Return the peak of a build's largest process, by its records and from outside; `verify` has its own row."""
    seen = [cost.peak_rss or 0 for name, cost in costs.items() if name != "verify"]
    largest = max(*seen, *(run.cost.peak_rss or 0 for run in runs))
    last = next(reversed([name for name in costs if name != "verify"]))
    return Row(f"peak RSS of any process, fetch … {last}", f"{megabytes(largest)} MB", wanted=PEAK)


def _second(checkpoint: Path, output: Path, options: Options) -> Row:
    """Measure tracing in a second build of the same architecture, into another folder."""
    options.log("a second build of the same architecture")
    done = build(checkpoint, output, "--until", "export")
    spent, state = seconds_in(done, "export")
    shutil.rmtree(output, ignore_errors=True)
    what = "tracing, second build of the architecture"
    if done.failure:
        return Row(what, UNKNOWN, wanted="0.0 s", note=done.failure)
    return Row(what, seconds(spent), wanted="0.0 s", note=state)


def _verified(size: str, checkpoint: Path, output: Path, options: Options) -> tuple[list[Row], dict[str, Cost]]:
    """Verify both targets in limited memory, then bundle in a separate process."""
    budget = VERIFY_GB.get(size, VERIFY_GB_ELSE)
    what = f"verify --memory {budget}GB, both targets"
    options.log(f"{size}: {what}")
    done = build(checkpoint, output, "--until", "verify", "--memory", f"{budget}GB")
    if not done.failure:
        options.log(f"{size}: bundle")
        bundled = build(checkpoint, output, "--memory", f"{budget}GB")
        done = replace(done, failure=bundled.failure)
    return verify_rows(what, done, f"≤ {budget},000 MB"), stages(output)


def _decoders(size: str, checkpoint: Path, folder: Path, options: Options) -> list[Row]:
    """Build our decoder and theirs alternately, in fp32 and in 4 bits; the calibrated one is built once."""
    rows: list[Row] = []
    for recipe, precision in DECODERS.items():
        ours: list[Decoder] = []
        theirs: list[Decoder] = []
        for number in range(options.repeat):
            options.log(f"{size}: text decoder, {recipe} and onnxruntime-genai's, {number + 1} of {options.repeat}")
            ours.append(comparators.ours(checkpoint, folder / "decoder", recipe))
            theirs.append(comparators.theirs(checkpoint, folder / "decoder", precision))
        rows += decoder_rows(recipe, ours, theirs, DECODER_WALL.get((size, recipe), ""))
    options.log(f"{size}: text decoder, {CALIBRATED}")
    calibrated = comparators.ours(checkpoint, folder / "decoder", CALIBRATED)
    return rows + decoder_rows(CALIBRATED, [calibrated], theirs[:1], "")
