"""What our figures stand beside, in the same run: a copy of the bytes, and onnxruntime-genai's own builder.

In: the files that a build wrote, or a checkpoint. Out: seconds and memory, or why there are none.
Guaranteed: whatever happens to a comparator, the bench goes on; what it wrote is removed.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.measure import Run, run

SPARE = 10**9  # bytes of disk that a copy leaves free
OURS, GENAI = ("-m", "bench.decoder"), ("-m", "onnxruntime_genai.models.builder")
# The decoder that we write too: embeddings in, logits out.
SAME_GRAPH = ("exclude_embeds=true", "hf_token=false")


@dataclass(frozen=True)
class Copy:
    """`nbytes` copied and flushed in `wall_s` seconds; or `failure` says why not."""

    wall_s: float
    nbytes: int
    failure: str | None = None


@dataclass(frozen=True)
class Decoder:
    """A text decoder built alone.

    Args:
        run: the process.
        flushed_s: seconds until its files were on the disk, those of the process included.
        nbytes: size of what it wrote.
    """

    run: Run
    flushed_s: float
    nbytes: int


def copy(files: Sequence[Path], scratch: Path) -> Copy:
    """`cp --reflink=never` and fsync of `files`, one after the other, each removed before the next.

    A file for which the disk has no room beside it is left out; `nbytes` says what was copied.
    """
    seconds, copied = 0.0, 0
    for file in files:
        size = file.stat().st_size
        if size + SPARE > shutil.disk_usage(scratch.parent).free:
            continue
        done = run(["cp", "--reflink=never", file, scratch])
        seconds += done.cost.wall_s
        if done.failure is None:
            seconds += _flush([scratch])
            copied += size
        scratch.unlink(missing_ok=True)
        if done.failure is not None:
            return Copy(seconds, copied, done.failure)
    return Copy(seconds, copied, None if copied else "no room on the disk for a second copy of any file")


def ours(checkpoint: Path, out: Path, recipe: str) -> Decoder:
    """Our text decoder of the target genai, see `bench.decoder`."""
    return _decoder([sys.executable, *OURS, checkpoint, out, recipe], out)


def theirs(checkpoint: Path, out: Path, precision: str) -> Decoder:
    """The text decoder that onnxruntime-genai's builder makes of the checkpoint."""
    options = ["-p", precision, "-e", "cpu", "-c", out / "cache", "--extra_options", *SAME_GRAPH]
    return _decoder([sys.executable, *GENAI, "-i", checkpoint, "-o", out, *options], out)


def _decoder(command: Sequence[object], out: Path) -> Decoder:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    try:
        done = run(command, settings={"HF_HUB_OFFLINE": "1"})
        files = [file for file in out.rglob("*") if file.is_file()]
        nbytes = sum(file.stat().st_size for file in files)
        if done.failure is None and not any(file.suffix == ".onnx" for file in files):
            done = replace(done, failure="no graph was written")
        return Decoder(done, done.cost.wall_s + _flush(files), nbytes)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _flush(files: Sequence[Path]) -> float:
    """Seconds until the files are on the disk."""
    begin = time.perf_counter()
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return time.perf_counter() - begin
