"""Measure the same checkpoint in llama.cpp, as a Q4_0 GGUF, with its own llama-bench.

docs/bench-runtime.md shows how to make the folder with its build and source.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.measure import Run, run
from bench.runtime.figures import COLD, DECODE, LOAD, PROMPTS, STEPS, TEXT_PEAK, Measured, prefill, process, together

VARIABLE = "LLAMA_CPP"
BENCH, QUANTIZE, CONVERTER = "build/bin/llama-bench", "build/bin/llama-quantize", "source/convert_hf_to_gguf.py"
PYTHONPATH = "python"  # folder of packages that only its converter needs


class AbsentError(Exception):
    """A comparator is missing; the message is the row's note."""


@dataclass(frozen=True)
class Llama:
    """A build of llama.cpp in `folder`."""

    folder: Path

    def program(self, name: str) -> Path:
        """Return the absolute path of a file of the build.

        Raises:
            AbsentError: the file is missing.
        """
        file = (self.folder / name).resolve()
        if not file.is_file():
            raise AbsentError(f"not installed: {name} is not in the folder that --llama or {VARIABLE} names")
        return file


def gguf(llama: Llama, checkpoint: Path, out: Path) -> Path:
    """Convert to bf16 and quantize to Q4_0 (defaults of llama-quantize, head in Q6_K), unless `out` exists.

    Raises:
        AbsentError: a program is missing, or fails.
    """
    llama.program(BENCH)
    if out.is_file():
        return out
    converter, quantize = llama.program(CONVERTER), llama.program(QUANTIZE)
    full, part = out.with_suffix(".bf16.gguf"), out.with_suffix(".part")
    settings = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str((llama.folder / PYTHONPATH).resolve())}
    try:
        convert = [sys.executable, converter, checkpoint.resolve(), "--outtype", "bf16", "--outfile", full.resolve()]
        _succeeded(run(convert, settings=settings))
        _succeeded(run([quantize, full.resolve(), part.resolve(), "Q4_0"]))
        return part.rename(out)
    finally:
        full.unlink(missing_ok=True)
        part.unlink(missing_ok=True)


def short(llama: Llama, model: Path, threads: int) -> Measured:
    """Measure load and first token, prefill of the short prompt, and decode after it."""
    count = PROMPTS[0]
    bench = partial(_bench, llama, model, threads)
    cold = bench("-p", count, "-n", 0, "--no-warmup", names={(count, 0): COLD})
    return together([cold, bench("-p", count, "-n", 0), bench("-p", 0, "-n", STEPS, "-d", count)])


def long(llama: Llama, model: Path, threads: int) -> Measured:
    """Measure prefill of the long prompt."""
    return _bench(llama, model, threads, "-p", PROMPTS[1], "-n", 0)


def figures(output: str, wall_s: float, names: Mapping[tuple[int, int], str] | None = None) -> dict[str, float]:
    """Parse llama-bench's JSON.

    Args:
        wall_s: seconds of the process; in a run without warm-up, all but the test is loading.
        names: (prompt, generated) → name of the figure; by default prefill and decode.
    """
    tests: list[dict[str, Any]] = json.loads(output)
    found: dict[str, float] = {}
    for test in tests:
        which, seconds = (int(test["n_prompt"]), int(test["n_gen"])), float(test["avg_ns"]) / 1e9
        if names is not None:
            found |= {names[which]: seconds, LOAD: wall_s - seconds}
        elif which[1]:
            found[DECODE] = which[1] / seconds
        else:
            found[prefill(which[0])] = seconds
    return found


def _bench(
    llama: Llama, model: Path, threads: int, *arguments: object, names: Mapping[tuple[int, int], str] | None = None
) -> Measured:
    command = [llama.program(BENCH), "-m", model.resolve(), "-t", threads, "-r", 1, "-o", "json", *arguments]
    return process(command, TEXT_PEAK, read=lambda done: figures(done.output, done.cost.wall_s, names))


def _succeeded(done: Run) -> None:
    if done.failure is not None:
        raise AbsentError(done.failure)


def somewhere(named: Path | None, environment: Mapping[str, str]) -> Llama:
    """Return the build that `--llama` or the variable names.

    Raises:
        AbsentError: neither names an existing folder.
    """
    folder = named or (Path(environment[VARIABLE]) if environment.get(VARIABLE) else None)
    if folder is None or not folder.is_dir():
        raise AbsentError(f"not installed: neither --llama nor {VARIABLE} names an existing folder")
    return Llama(folder)
