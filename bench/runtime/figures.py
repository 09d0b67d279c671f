"""Names of the figures, and the measurement of one or several processes.

A measured command prints its figures as JSON on its last line. A process that fails is a `Measured` with the reason.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from statistics import median

import psutil

from bench.measure import Run, run

PROMPTS = (128, 1024)  # tokens of a text prompt
STEPS = 64  # tokens decoded after the shorter prompt
# Patches (height, width) after smart_resize of an image of this size: sides become multiples of 32 pixels.
IMAGES: Mapping[str, tuple[int, int]] = {"640×480": (30, 40), "1280×720": (44, 80)}

LOAD, COLD, DECODE = "load_s", "cold_s", "decode_tps"
TEXT_PEAK, IMAGE_PEAK, VISION_PEAK = "text_peak", "image_peak", "vision_peak"
READ = "read "  # + the kernel's name: bytes per second
DISTURBED = 0.1  # cores that other processes may use
TRIES = 3


def prefill(tokens: int) -> str:
    """Seconds to the first token after a prompt of `tokens`."""
    return f"prefill_{tokens}_s"


def vision(image: str) -> str:
    """Seconds of the vision encoder alone."""
    return f"vision_{image}_s"


def answer(image: str) -> str:
    """Seconds from pixel values and token ids to the first token."""
    return f"image_{image}_s"


@dataclass(frozen=True)
class Measured:
    """Result of a process.

    Args:
        others: cores used on average by the rest of the machine, including other guests of its host.
    """

    figures: Mapping[str, float]
    failure: str | None = None
    others: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """All runs of a contestant: figure → a value per round; failures; the largest `Measured.others`."""

    runs: Mapping[str, Sequence[float]] = field(default_factory=dict)
    failures: tuple[str, ...] = ()
    others: float = 0.0

    def typical(self, name: str) -> float | None:
        """Return the median, or the highest of a peak; None if it was not measured."""
        values = self.runs.get(name)
        if not values:
            return None
        return max(values) if name.endswith("_peak") else median(values)


def process(
    command: Sequence[object],
    peak: str | None = None,
    settings: Mapping[str, str] | None = None,
    read: Callable[[Run], Mapping[str, float]] | None = None,
) -> Measured:
    """Run `command` and return its figures, with its peak RSS as `peak`.

    Args:
        read: extracts the figures; by default from the last line, as JSON.
    """
    before = busy()
    done = run(command, settings=settings)
    others = max(0.0, busy() - before - done.cost.cpu_s) / max(done.cost.wall_s, 1e-3)
    if done.failure is not None:
        return Measured({}, done.failure, others)
    peaks = {peak: float(done.cost.peak_rss or 0)} if peak else {}
    return Measured({**(read or _last_line)(done), **peaks}, None, others)


def together(each: Iterable[Measured]) -> Measured:
    """Combine several processes: all figures, the higher of a peak, the first failure."""

    def add(first: Measured, other: Measured) -> Measured:
        peaks = {name: max(first.figures.get(name, 0.0), value) for name, value in other.figures.items()}
        figures = {**first.figures, **{n: peaks[n] if n.endswith("_peak") else v for n, v in other.figures.items()}}
        return Measured(figures, first.failure or other.failure, max(first.others, other.others))

    return reduce(add, each)


def undisturbed(measure: Callable[[], Measured], patience: float) -> Measured:
    """Return the least disturbed run of `measure`: the first with `others` below `DISTURBED`, or the best of `TRIES`.

    Args:
        patience: seconds to wait, before each run, for an idle machine; 0 returns the first run.
    """
    best: Measured | None = None
    for _ in range(TRIES if patience else 1):
        wait_for_quiet(patience)
        measured = measure()
        if best is None or measured.others < best.others:
            best = measured
        if measured.failure is not None or measured.others <= DISTURBED:
            break
    assert best is not None
    return best


def wait_for_quiet(patience: float) -> None:
    """Wait until the machine is idle for two seconds, at most `patience` seconds."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        before = busy()
        time.sleep(2)
        if busy() - before <= 2 * DISTURBED:
            return


def busy() -> float:
    """Return the CPU seconds that this machine has used, or that its host has withheld, since boot."""
    times = psutil.cpu_times()
    names = ("user", "nice", "system", "irq", "softirq", "steal")
    return float(sum(getattr(times, name, 0.0) for name in names))


def _last_line(done: Run) -> dict[str, float]:
    return {str(name): float(value) for name, value in json.loads(done.output.strip().splitlines()[-1]).items()}
