"""Who is measured: a name, and a command for each group of figures.

In: folders and programs that are there. Out: `Contestant`s, which know nothing of each other.
Guaranteed: what is absent is a contestant too; it says why.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench.runtime import folders, llama
from bench.runtime.figures import IMAGE_PEAK, TEXT_PEAK, VISION_PEAK, Measured, process
from bench.runtime.llama import Llama

AS_IT_COMES = "as it comes"


@dataclass(frozen=True)
class Contestant:
    """One line of the tables.

    Args:
        tasks: name → what measures it, in processes of its own.
        nbytes: on the disk.
        step: bytes of weights that a decode step reads.
        once: slow, so that it runs in the first round only.
        absent: why there is none; then it has no tasks.
    """

    name: str
    tasks: Mapping[str, Callable[[], Measured]] = field(default_factory=dict)
    nbytes: int | None = None
    step: int | None = None
    once: bool = False
    absent: str | None = None


def machine(threads: int) -> Contestant:
    """How fast memory is read."""
    return Contestant("this machine", {"bandwidth": partial(process, _module("bandwidth", threads))})


def genai(name: str, folder: Path) -> Contestant:
    """A text decoder of onnxruntime-genai."""
    tasks: dict[str, Callable[[], Measured]] = {
        task: partial(process, _module("genai", task, folder), TEXT_PEAK) for task in ("short", "long")
    }
    return Contestant(name, tasks, folders.size(folder), folders.read_by_a_step(folder))


def bundle(name: str, folder: Path, threads: int | None) -> Contestant:
    """A bundle of ours: its text decoder and, where it has them, images; its vision encoder alone on `threads`."""
    text = genai(name, folder)
    tasks: dict[str, Callable[[], Measured]] = {**text.tasks}
    tasks |= {"image": partial(process, _module("genai", "image", folder), IMAGE_PEAK)}
    if threads is not None:
        tasks["vision"] = partial(process, _module("vision", folder, threads), VISION_PEAK)
    return Contestant(name, tasks, text.nbytes, text.step)


def llama_cpp(name: str, build: Llama, model: Path, threads: int) -> Contestant:
    """llama.cpp; all of its file but norms are matrices, and the tied one is read as the head."""
    tasks = {
        "short": partial(llama.short, build, model, threads),
        "long": partial(llama.long, build, model, threads),
    }
    size = model.stat().st_size
    return Contestant(name, tasks, size, size)


def pytorch(checkpoint: Path, dtype: str, attention: str, threads: int) -> Contestant:
    """transformers; its text decoder with all weights loaded, its vision encoder alone."""
    asked = (checkpoint, dtype, attention, threads)
    settings = {"HF_HUB_OFFLINE": "1"}
    tasks = {
        task: partial(process, _module("pytorch", task, *asked), peak, settings)
        for task, peak in {"text": TEXT_PEAK, "vision": VISION_PEAK}.items()
    }
    return Contestant(f"PyTorch {attention} {dtype}", tasks, folders.size(checkpoint), once=True)


def _module(name: str, *arguments: object) -> list[object]:
    return [sys.executable, "-m", f"bench.runtime.{name}", *arguments]
