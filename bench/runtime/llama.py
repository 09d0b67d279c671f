"""llama.cpp beside us: the same checkpoint as a Q4_0 GGUF, measured by its own llama-bench.

In: a folder with a build of llama.cpp and its source (docs/bench-runtime.md says how to make one), a checkpoint.
Out: a GGUF, `Measured`. Guaranteed: where a program is missing, the words say which.
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
PYTHONPATH = "python"  # packages that its converter needs and this environment has not


class AbsentError(Exception):
    """A comparator that is not there; its message is the row's note."""


@dataclass(frozen=True)
class Llama:
    """A build of llama.cpp in `folder`."""

    folder: Path

    def program(self, name: str) -> Path:
        """A file of the build, absolute.

        Raises:
            AbsentError: it is not there.
        """
        file = (self.folder / name).resolve()
        if not file.is_file():
            raise AbsentError(f"not installed: {name} is not in the folder that --llama or {VARIABLE} names")
        return file


def gguf(llama: Llama, checkpoint: Path, out: Path) -> Path:
    """`out`, converted to bf16 and quantized to Q4_0 unless it is there; llama-quantize's defaults, head in Q6_K.

    Raises:
        AbsentError: a program is missing, or fails.
    """
    llama.program(BENCH)
    if out.is_file():
        return out
    converter, quantize = llama.program(CONVERTER), llama.program(QUANTIZE)
    whole, part = out.with_suffix(".bf16.gguf"), out.with_suffix(".part")
    settings = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str((llama.folder / PYTHONPATH).resolve())}
    try:
        convert = [sys.executable, converter, checkpoint.resolve(), "--outtype", "bf16", "--outfile", whole.resolve()]
        _succeeded(run(convert, settings=settings))
        _succeeded(run([quantize, whole.resolve(), part.resolve(), "Q4_0"]))
        return part.rename(out)
    finally:
        whole.unlink(missing_ok=True)
        part.unlink(missing_ok=True)


def short(llama: Llama, model: Path, threads: int) -> Measured:
    """Load and first token, prefill of the short prompt, decode behind it."""
    count = PROMPTS[0]
    bench = partial(_bench, llama, model, threads)
    cold = bench("-p", count, "-n", 0, "--no-warmup", names={(count, 0): COLD})
    return together([cold, bench("-p", count, "-n", 0), bench("-p", 0, "-n", STEPS, "-d", count)])


def long(llama: Llama, model: Path, threads: int) -> Measured:
    """Prefill of the long prompt."""
    return _bench(llama, model, threads, "-p", PROMPTS[1], "-n", 0)


def figures(output: str, wall_s: float, names: Mapping[tuple[int, int], str] | None = None) -> dict[str, float]:
    """From llama-bench's JSON.

    Args:
        wall_s: of the process: what is not the test of a run without warm-up is loading.
        names: (prompt, generated) → what to call it; by default prefill and decode.
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
    """What `--llama` or the variable names.

    Raises:
        AbsentError: neither is set.
    """
    folder = named or (Path(environment[VARIABLE]) if environment.get(VARIABLE) else None)
    if folder is None or not folder.is_dir():
        raise AbsentError(f"not installed: neither --llama nor {VARIABLE} names a folder that is there")
    return Llama(folder)
