"""Measure what our figures are compared with: a copy of the bytes, and onnxruntime-genai's own builder.

A comparator that fails is a result, not an error; its files are removed.
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
# The same graph as ours: embeddings in, logits out.
SAME_GRAPH = ("exclude_embeds=true", "hf_token=false")


@dataclass(frozen=True)
class Copy:
    """A copy of `nbytes`, flushed, in `wall_s` seconds; `failure` is the reason if there was none."""

    wall_s: float
    nbytes: int
    failure: str | None = None


@dataclass(frozen=True)
class Decoder:
    """A text decoder built on its own.

    Args:
        run: the process.
        flushed_s: seconds until its files were on the disk, including those of the process.
        nbytes: size of its files.
    """

    run: Run
    flushed_s: float
    nbytes: int


def copy(files: Sequence[Path], scratch: Path) -> Copy:
    """Copy `files` with `cp --reflink=never` and fsync, each removed before the next.

    A file whose copy does not fit on the disk is skipped; `nbytes` counts what was copied.
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
    """Build our text decoder of the target genai, see `bench.decoder`."""
    return _decoder([sys.executable, *OURS, checkpoint, out, recipe], out)


def theirs(checkpoint: Path, out: Path, precision: str) -> Decoder:
    """Build the text decoder with onnxruntime-genai's builder."""
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
    """Return the seconds until the files are on the disk."""
    begin = time.perf_counter()
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return time.perf_counter() - begin
