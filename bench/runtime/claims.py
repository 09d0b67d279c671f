"""What our artifact's speed must be beside the others', as data, and how far it is so.

In: outcomes of one run. Out: rows, the ratio that is wanted beside the one that was measured.
Guaranteed: a ratio is given only where both sides were measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.runtime.contestants import AS_IT_COMES
from bench.runtime.figures import DECODE, IMAGES, LOAD, PROMPTS, TEXT_PEAK, Outcome, prefill, vision
from bench.table import UNKNOWN, Row

THEIRS, LLAMA, SDPA = "onnxruntime-genai's builder", "llama.cpp Q4_0", "PyTorch sdpa float32"


@dataclass(frozen=True)
class Claim:
    """One bound.

    Args:
        figure: of `bench.runtime.figures`: a rate where its name ends with `_tps`, a peak with `_peak`, else seconds.
        beside: whose figure it stands beside; what is set is said behind it.
        bound: of the ratio.
        speed: the ratio is how many times as fast ours is, at least; else ours through theirs, at most.
        as_it_comes: nothing is set on either side; else both are on the asked number of threads.
    """

    what: str
    figure: str
    beside: str
    bound: float
    speed: bool = True
    as_it_comes: bool = False


SHORT, LONG = PROMPTS
SMALL, _ = IMAGES
CLAIMS = (
    Claim("decode", DECODE, THEIRS, 1.2),
    Claim("decode", DECODE, LLAMA, 0.9),
    Claim("decode, out of the box", DECODE, THEIRS, 1.7, as_it_comes=True),
    Claim(f"prefill of {SHORT} tokens", prefill(SHORT), THEIRS, 1.1),
    Claim(f"prefill of {LONG:,} tokens", prefill(LONG), THEIRS, 1.3),
    Claim(f"prefill of {SHORT} tokens", prefill(SHORT), LLAMA, 1.0),
    Claim(f"vision encoder, {SMALL}", vision(SMALL), SDPA, 2.0),
    Claim("load", LOAD, THEIRS, 1.0, speed=False),
    Claim("peak RSS, text", TEXT_PEAK, THEIRS, 1.0, speed=False),
)


def named(name: str, threads: int | None) -> str:
    """A contestant that can be set up, on `threads` or as it comes."""
    return f"{name}, {AS_IT_COMES}" if threads is None else f"{name}, threads set to {threads}"


def rows(ours: str, outcomes: Mapping[str, Outcome], threads: int, claims: Sequence[Claim] = CLAIMS) -> list[Row]:
    """A row a claim on the recipe `ours`."""
    return [_row(claim, ours, outcomes, None if claim.as_it_comes else threads) for claim in claims]


def shown(figure: str, value: float | None) -> str:
    """With its unit; a prefill as tokens a second."""
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
    beside = named(claim.beside, threads) if claim.beside == THEIRS else claim.beside
    wanted = f"{'≥' if claim.speed else '≤'} {claim.bound:.2f}"
    mine, other = (outcomes.get(name, Outcome()).typical(claim.figure) for name in (named(ours, threads), beside))
    texts = shown(claim.figure, mine), shown(claim.figure, other)
    return Row(claim.what, *texts, _ratio(claim, mine, other), wanted, beside)


def _ratio(claim: Claim, ours: float | None, other: float | None) -> str:
    if not ours or not other:
        return UNKNOWN
    faster_when_small = claim.speed and not claim.figure.endswith("_tps")
    return f"{other / ours if faster_when_small else ours / other:.2f}"
