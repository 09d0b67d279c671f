"""Define the contestants: a name, and a command for each group of figures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench.runtime import folders, llama
from bench.runtime.figures import IMAGE_PEAK, TEXT_PEAK, VISION_PEAK, Measured, process
from bench.runtime.llama import Llama

DEFAULT_THREADS = "default threads"


@dataclass(frozen=True)
class Contestant:
    """A line of the tables.

    Args:
        tasks: name → function that measures it, in separate processes.
        nbytes: size on the disk.
        step: bytes of weights that a decode step reads.
        once: run only in the first round, because it is slow.
        absent: the reason why it is missing; it then has no tasks.
    """

    name: str
    tasks: Mapping[str, Callable[[], Measured]] = field(default_factory=dict)
    nbytes: int | None = None
    step: int | None = None
    once: bool = False
    absent: str | None = None


def machine(threads: int) -> Contestant:
    """Return the contestant that measures memory bandwidth."""
    return Contestant("this machine", {"bandwidth": partial(process, _module("bandwidth", threads))})


def genai(name: str, folder: Path) -> Contestant:
    """Return a text decoder for onnxruntime-genai."""
    tasks: dict[str, Callable[[], Measured]] = {
        task: partial(process, _module("genai", task, folder), TEXT_PEAK) for task in ("short", "long")
    }
    return Contestant(name, tasks, folders.size(folder), folders.read_by_a_step(folder))


def bundle(name: str, folder: Path, threads: int | None) -> Contestant:
    """Return one of our bundles: text, images, and, if `threads` is set, the vision encoder alone."""
    text = genai(name, folder)
    tasks: dict[str, Callable[[], Measured]] = {**text.tasks}
    tasks |= {"image": partial(process, _module("genai", "image", folder), IMAGE_PEAK)}
    if threads is not None:
        tasks["vision"] = partial(process, _module("vision", folder, threads), VISION_PEAK)
    return Contestant(name, tasks, text.nbytes, text.step)


def llama_cpp(name: str, build: Llama, model: Path, threads: int) -> Contestant:
    """Return llama.cpp. A step reads all of its file: only norms are not matrices, and the tied matrix is the head."""
    tasks = {
        "short": partial(llama.short, build, model, threads),
        "long": partial(llama.long, build, model, threads),
    }
    size = model.stat().st_size
    return Contestant(name, tasks, size, size)


def pytorch(checkpoint: Path, dtype: str, attention: str, threads: int) -> Contestant:
    """Return transformers: its text decoder with all weights loaded, and its vision encoder alone."""
    arguments = (checkpoint, dtype, attention, threads)
    settings = {"HF_HUB_OFFLINE": "1"}
    tasks = {
        task: partial(process, _module("pytorch", task, *arguments), peak, settings)
        for task, peak in {"text": TEXT_PEAK, "vision": VISION_PEAK}.items()
    }
    return Contestant(f"PyTorch {attention} {dtype}", tasks, folders.size(checkpoint), once=True)


def _module(name: str, *arguments: object) -> list[object]:
    return [sys.executable, "-m", f"bench.runtime.{name}", *arguments]
