"""Required speed ratios of our artifact to the others, as data, compared with the measured ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.runtime.contestants import DEFAULT_THREADS
from bench.runtime.figures import DECODE, IMAGES, LOAD, PROMPTS, TEXT_PEAK, Outcome, prefill, vision
from bench.table import UNKNOWN, Row

THEIRS, LLAMA, SDPA = "onnxruntime-genai's builder", "llama.cpp Q4_0", "PyTorch sdpa float32"


@dataclass(frozen=True)
class Claim:
    """A bound on one ratio.

    Args:
        figure: of `bench.runtime.figures`; a rate if its name ends with `_tps`, a peak with `_peak`, else seconds.
        other: the contestant that ours is compared with, without its number of threads.
        bound: on the ratio.
        speed: the ratio is the speedup of ours, at least `bound`; otherwise ours / theirs, at most `bound`.
        default_threads: neither side sets its threads; otherwise both use the requested number.
    """

    what: str
    figure: str
    other: str
    bound: float
    speed: bool = True
    default_threads: bool = False


SHORT, LONG = PROMPTS
SMALL, _ = IMAGES
CLAIMS = (
    Claim("decode", DECODE, THEIRS, 1.2),
    Claim("decode", DECODE, LLAMA, 0.9),
    Claim("decode, out of the box", DECODE, THEIRS, 1.7, default_threads=True),
    Claim(f"prefill of {SHORT} tokens", prefill(SHORT), THEIRS, 1.1),
    Claim(f"prefill of {LONG:,} tokens", prefill(LONG), THEIRS, 1.3),
    Claim(f"prefill of {SHORT} tokens", prefill(SHORT), LLAMA, 1.0),
    Claim(f"vision encoder, {SMALL}", vision(SMALL), SDPA, 2.0),
    Claim("load", LOAD, THEIRS, 1.0, speed=False),
    Claim("peak RSS, text", TEXT_PEAK, THEIRS, 1.0, speed=False),
)


def named(name: str, threads: int | None) -> str:
    """Return a contestant's name with its threads; None is the default number."""
    return f"{name}, {DEFAULT_THREADS}" if threads is None else f"{name}, threads set to {threads}"


def rows(ours: str, outcomes: Mapping[str, Outcome], threads: int, claims: Sequence[Claim] = CLAIMS) -> list[Row]:
    """Return a row per claim, for the recipe `ours`."""
    return [_row(claim, ours, outcomes, None if claim.default_threads else threads) for claim in claims]


def shown(figure: str, value: float | None) -> str:
    """Format a figure with its unit; a prefill as tokens per second."""
    if value is None:
        return UNKNOWN
    if figure.endswith("_peak"):
        return f"{value / 1e6:,.0f} MB"
    if figure.endswith("_tps"):
        return f"{value:,.1f} tok/s"
    for tokens in PROMPTS:
        if figure == prefill(tokens):
            return f"{tokens / value:,.1f} tok/s"
    return f"{value:,.2f} s"


def _row(claim: Claim, ours: str, outcomes: Mapping[str, Outcome], threads: int | None) -> Row:
    opponent = named(claim.other, threads) if claim.other == THEIRS else claim.other
    wanted = f"{'≥' if claim.speed else '≤'} {claim.bound:.2f}"
    mine, other = (outcomes.get(name, Outcome()).typical(claim.figure) for name in (named(ours, threads), opponent))
    texts = shown(claim.figure, mine), shown(claim.figure, other)
    return Row(claim.what, *texts, _ratio(claim, mine, other), wanted, opponent)


def _ratio(claim: Claim, ours: float | None, other: float | None) -> str:
    if not ours or not other:
        return UNKNOWN
    faster_when_small = claim.speed and not claim.figure.endswith("_tps")
    return f"{other / ours if faster_when_small else ours / other:.2f}"
