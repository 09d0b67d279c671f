"""Names of what is measured, and what one process or many of them found.

In: a command that prints its figures as JSON on its last line. Out: `Measured`.
Guaranteed: a process that fails is a `Measured` that says why; how much of the machine others took meanwhile is known.
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
STEPS = 64  # tokens that are decoded behind the shorter one
# Patches (height, width) of an image that smart_resize makes of one so large: sides are multiples of 32 pixels.
IMAGES: Mapping[str, tuple[int, int]] = {"640×480": (30, 40), "1280×720": (44, 80)}

LOAD, COLD, DECODE = "load_s", "cold_s", "decode_tps"
TEXT_PEAK, IMAGE_PEAK, VISION_PEAK = "text_peak", "image_peak", "vision_peak"
READ = "read "  # + the kernel's name: bytes a second
DISTURBED = 0.1  # cores that others may take
TRIES = 3


def prefill(tokens: int) -> str:
    """Seconds to the first token behind a prompt of so many."""
    return f"prefill_{tokens}_s"


def vision(image: str) -> str:
    """Seconds of the vision encoder alone."""
    return f"vision_{image}_s"


def answer(image: str) -> str:
    """Seconds from pixel values and token ids to the first token."""
    return f"image_{image}_s"


@dataclass(frozen=True)
class Measured:
    """What a process found.

    Args:
        others: cores that the rest of the machine used on average meanwhile, other guests of its host included.
    """

    figures: Mapping[str, float]
    failure: str | None = None
    others: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """Every run of a contestant: figure → values, a round each; what failed; the most that others took."""

    runs: Mapping[str, Sequence[float]] = field(default_factory=dict)
    failures: tuple[str, ...] = ()
    others: float = 0.0

    def typical(self, name: str) -> float | None:
        """The median, of a peak the highest; None where it was not measured."""
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
    """Run `command`; its figures, its peak RSS among them as `peak`.

    Args:
        read: figures from the process; by default its last line, JSON.
    """
    before = busy()
    done = run(command, settings=settings)
    others = max(0.0, busy() - before - done.cost.cpu_s) / max(done.cost.wall_s, 1e-3)
    if done.failure is not None:
        return Measured({}, done.failure, others)
    peaks = {peak: float(done.cost.peak_rss or 0)} if peak else {}
    return Measured({**(read or _last_line)(done), **peaks}, None, others)


def together(each: Iterable[Measured]) -> Measured:
    """One after the other: all figures, of a peak the higher; the first failure."""

    def add(one: Measured, other: Measured) -> Measured:
        peaks = {name: max(one.figures.get(name, 0.0), value) for name, value in other.figures.items()}
        figures = {**one.figures, **{n: peaks[n] if n.endswith("_peak") else v for n, v in other.figures.items()}}
        return Measured(figures, one.failure or other.failure, max(one.others, other.others))

    return reduce(add, each)


def undisturbed(measure: Callable[[], Measured], patience: float) -> Measured:
    """The run of `measure` that others disturbed least: the first that they hardly did, or the best of `TRIES`.

    Args:
        patience: seconds to wait, before each, for a moment at which the machine is idle; 0 takes the first as it is.
    """
    best: Measured | None = None
    for _ in range(TRIES if patience else 1):
        wait_for_quiet(patience)
        found = measure()
        if best is None or found.others < best.others:
            best = found
        if found.failure is not None or found.others <= DISTURBED:
            break
    assert best is not None
    return best


def wait_for_quiet(patience: float) -> None:
    """Until nobody uses the machine for two seconds, or `patience` is over."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        before = busy()
        time.sleep(2)
        if busy() - before <= 2 * DISTURBED:
            return


def busy() -> float:
    """CPU seconds that this machine has spent, or has been denied by its host, so far."""
    times = psutil.cpu_times()
    names = ("user", "nice", "system", "irq", "softirq", "steal")
    return float(sum(getattr(times, name, 0.0) for name in names))


def _last_line(done: Run) -> dict[str, float]:
    return {str(name): float(value) for name, value in json.loads(done.output.strip().splitlines()[-1]).items()}
