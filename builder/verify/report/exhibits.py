"""Collect what a report shows of each case: images, both answers, sampled logits, divergences.

The `show_…` functions record while a verification runs, and do nothing outside `collecting()`. Exhibits never decide a
verdict; gates do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from builder.util.statistics import kl_divergence, log_softmax
from builder.verify.report.thumbnails import difference, patches_to_image, scaled, thumbnail

if TYPE_CHECKING:
    from builder.checkpoint.config import Vision

Array = npt.NDArray[Any]
POINTS = 160  # logits of one case
POSITIONS = 256  # divergences of one case
LEADING = 4  # of the logits of a position: the reference's largest, which decide the token
TEXT = 400  # characters of an answer or a prompt


@dataclass(frozen=True)
class Pixels:
    """One image's pixel values on both sides, normalized as the vision encoder takes them.

    Args:
        way: who computed them: our preprocessing, or the runtime's own processor.
        values: number compared.
        differing: number that differ.
        largest: the largest absolute difference; None if the grids differ or a value is not finite.
        difference: the absolute difference as an image, a data URI, black where equal; "" if nothing differs.
        sides: data URIs of both images, PyTorch's first; empty if nothing differs.
    """

    way: str
    values: int
    differing: int
    largest: float | None = None
    difference: str = ""
    sides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Thumbnail:
    """An image of a case: its file name, a small copy (a data URI, "" if left out), and its comparisons."""

    name: str
    thumbnail: str
    pixels: tuple[Pixels, ...] = ()


@dataclass(frozen=True)
class Exhibit:
    """One case, with the outputs of PyTorch and of the artifact.

    Args:
        kind: `case` (compared token by token) or `task` (a held-out question, compared by its answer).
        expected: the held-out answer.
        answers: texts, PyTorch's then the artifact's; empty if none was generated.
        logits: sampled pairs (PyTorch's, the artifact's) of the same token at the same position.
        divergences: Kullback-Leibler divergence of the next-token distributions at each position, in nats.
        undefined: number of positions at which a logit is not finite.
    """

    case: str
    kind: str
    prompt: str
    images: tuple[Thumbnail, ...] = ()
    expected: str | None = None
    answers: tuple[str, ...] = ()
    logits: tuple[tuple[float, float], ...] = ()
    divergences: tuple[float, ...] = ()
    undefined: int = 0


@dataclass
class _Collected:
    """Everything recorded so far; `current` is the case being recorded."""

    vision: Vision
    shown: dict[tuple[str, str, tuple[Path, ...]], Exhibit] = field(default_factory=dict)
    current: tuple[str, str, tuple[Path, ...]] | None = None
    spans: set[tuple[str, tuple[int, int]]] = field(default_factory=set)

    def change(self, **changes: Any) -> None:
        assert self.current is not None
        self.shown[self.current] = replace(self.shown[self.current], **changes)

    @property
    def exhibit(self) -> Exhibit | None:
        return None if self.current is None else self.shown[self.current]


_COLLECTED: ContextVar[_Collected | None] = ContextVar("collected", default=None)


@contextmanager
def collecting(vision: Vision) -> Iterator[Callable[[], tuple[Exhibit, ...]]]:
    """Record exhibits inside the block; call the yielded function to get them.

    Args:
        vision: sizes needed to turn pixel values back into images.
    """
    collected = _Collected(vision)
    token = _COLLECTED.set(collected)
    try:
        yield lambda: tuple(collected.shown.values())
    finally:
        _COLLECTED.reset(token)


def show_case(
    name: str, prompt: str, images: Sequence[Path], *, kind: str = "case", expected: str | None = None
) -> None:
    """Start recording a case."""
    collected = _COLLECTED.get()
    if collected is None:
        return
    collected.current = (name, prompt, tuple(images))
    if collected.current not in collected.shown:
        thumbnails = tuple(Thumbnail(path.name, thumbnail(path)) for path in images)
        collected.shown[collected.current] = Exhibit(name, kind, _cut(prompt), thumbnails, expected)


def show_pixels(
    way: str, got: Array | None, want: Array | None, got_grid: Array | None, want_grid: Array | None
) -> None:
    """Record the pixel values of every image of the case.

    Args:
        way: see `Pixels`.
        got: the artifact's, [patches, channels·temporal·patch²] float32.
        want: PyTorch's.
        got_grid: [images, 3] int64, the artifact's.
        want_grid: PyTorch's.
    """
    collected = _COLLECTED.get()
    if collected is None or collected.exhibit is None or want is None or want_grid is None:
        return
    theirs = _by_image(want, want_grid)
    ours = [] if got is None or got_grid is None else _by_image(got, got_grid)
    images = list(collected.exhibit.images)
    for index, (patches, size) in enumerate(theirs[: len(images)]):
        other = ours[index] if len(ours) == len(theirs) else None
        pixels = _pixels(way, other, (patches, size), collected.vision)
        images[index] = replace(images[index], pixels=(*images[index].pixels, pixels))
    collected.change(images=tuple(images))


def show_answers(got: str, want: str) -> None:
    """Record the answers of both sides."""
    collected = _COLLECTED.get()
    if collected is not None and collected.exhibit is not None:
        collected.change(answers=(_cut(want), _cut(got)))


def show_logits(name: str, span: tuple[int, int], got: Array, want: Array) -> None:
    """Record a sample of the logits of both sides, and their divergences.

    Args:
        name: of a case that was passed to `show_case`.
        span: begin and end of the tokens; a span is recorded only once.
        got: the artifact's, [… positions, vocab].
        want: PyTorch's.
    """
    collected = _COLLECTED.get()
    if collected is None or got.size != want.size or want.size == 0 or (name, span) in collected.spans:
        return
    collected.current = next((key for key in collected.shown if key[0] == name), None)
    before = collected.exhibit
    if before is None:
        return
    collected.spans.add((name, span))
    ours, theirs = got.reshape(-1, got.shape[-1]), want.reshape(-1, want.shape[-1])
    pairs, divergences, undefined = list(before.logits), list(before.divergences), before.undefined
    for row in _spread(len(theirs), POSITIONS - len(divergences)):
        divergence = float(kl_divergence(log_softmax(theirs[row]), log_softmax(ours[row])))
        undefined += not np.isfinite(divergence)
        divergences += [_short(divergence)] if np.isfinite(divergence) else []
    for row in _spread(len(theirs), max(1, (POINTS - len(pairs)) // (8 * LEADING))):
        columns = _sample(theirs[row])
        pairs += [
            (_short(a, 9), _short(b, 9))
            for a, b in zip(theirs[row][columns], ours[row][columns], strict=True)
            if np.isfinite(a) and np.isfinite(b)
        ]
    collected.change(logits=tuple(pairs[:POINTS]), divergences=tuple(divergences), undefined=undefined)


def _spread(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` of `count` row indices, evenly spread and including the last."""
    if wanted <= 0:
        return []
    return sorted({count - 1 - step * count // min(count, wanted) for step in range(min(count, wanted))})


def _sample(row: Array) -> Array:
    """Return column indices: the `LEADING` largest, and others evenly spread by rank."""
    order = np.argsort(row)
    spread = np.linspace(0, len(order) - 1, min(7 * LEADING, len(order))).astype(int)
    return np.unique(np.concatenate([order[-LEADING:], order[spread]]))


def _by_image(pixels: Array, grid: Array) -> list[tuple[Array, Array]]:
    """Split into each image's patches and its (frames, rows, columns)."""
    ends = np.cumsum(grid.prod(-1))
    if len(ends) and ends[-1] != len(pixels):
        return []
    return list(zip(np.split(pixels, ends[:-1]), grid, strict=True))


def _pixels(way: str, got: tuple[Array, Array] | None, want: tuple[Array, Array], vision: Vision) -> Pixels:
    patches, size = want
    if got is None or got[0].shape[1:] != patches.shape[1:]:
        return Pixels(way, patches.size, patches.size)
    if np.array_equal(got[1], size) and np.array_equal(got[0], patches):
        return Pixels(way, patches.size, 0, 0.0)
    images = [patches_to_image(*side, vision) for side in (want, got)]
    low, high = float(images[0].min()), float(images[0].max())
    sides = tuple(scaled(image, low, high) for image in images)
    if not np.array_equal(got[1], size):
        return Pixels(way, patches.size, patches.size, None, "", sides)
    gap = np.abs(got[0].astype(np.float64) - patches)
    differing = int((got[0] != patches).sum())
    shown = difference(patches_to_image(gap, size, vision))
    largest = float(gap.max())
    return Pixels(way, patches.size, differing, _short(largest) if np.isfinite(largest) else None, shown, sides)


def _short(value: float, digits: int = 4) -> float:
    """Round to a few digits, to keep the JSON small."""
    return float(f"{float(value):.{digits}g}")


def _cut(text: str) -> str:
    return text if len(text) <= TEXT else text[: TEXT - 1] + "…"
