"""What a bundle that is not exact loses: its answers beside those of PyTorch in fp32.

In: the bundle as it ships, and the reference of the checkpoint. Out: gates with the recipe's limits, and the figures.
Guaranteed: both sides are given the same tokens (teacher forcing), and each makes its own image features; every
position behind the last image is compared; no margin excuses anything. The figures: KL divergence of the next
token's distribution (nats), the share of positions with the same likeliest token, the ratio of perplexities on
builder/suite/prose.txt, how far the residual stream behind each layer has drifted, the score on the held-out cases,
and, of tokens that are generated freely, the largest lead of PyTorch's own choice over one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from builder.reference.cases import MAX_PATCHES, SUITE, Case, Suite
from builder.reference.model import Prompt, Reference
from builder.targets.config_files import eos_token_ids
from builder.targets.recipe import Limits
from builder.targets.runners.protocol import Runner
from builder.targets.runners.registry import open_runner
from builder.util.statistics import kl_divergence, log_softmax
from builder.verify.graphs.all_logits import forced, shipped_graphs
from builder.verify.graphs.sessions import Graphs
from builder.verify.report.gates import Gate

PROSE = SUITE / "prose.txt"
ANSWER = 16  # tokens of an answer that is made to be compared

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Compared:
    """One case.

    Args:
        tokens: the bundle's answer, greedy, in its own runtime.
        kl: [positions], nats; `same`: [positions], whether the likeliest token is the same.
        drift: of each layer's residual stream: |difference| over |PyTorch's|.
        lead: of PyTorch's choice over a token of the answer, in logits; 0 where all are its own.
    """

    case: Case
    tokens: tuple[int, ...]
    kl: Array
    same: Array
    drift: list[float]
    lead: float
    detail: str


@dataclass(frozen=True)
class Sides:
    """The bundle in plain sessions and in its own runtime, and PyTorch."""

    graphs: Graphs
    runner: Runner
    reference: Reference

    @classmethod
    def open(cls, folder: Path, target: str, reference: Reference) -> Sides:
        graphs = shipped_graphs(folder, target, reference.checkpoint.text.hidden)
        return cls(graphs, open_runner(folder, target), reference)

    def forced(self, prompt: Prompt, answer: Sequence[int]) -> tuple[Array, list[Array]]:
        """The bundle's logits [seq, vocab], and its residual streams, [seq, H] each."""
        return forced(self.graphs, prompt, answer, self.reference.image_token_id)


def quality_gates(
    folder: Path,
    target: str,
    reference: Reference,
    limits: Limits,
    suite: Suite,
) -> tuple[list[Gate], dict[str, Any]]:
    """The gates of the bundle in `folder`, and the figures."""
    sides = Sides.open(folder, target, reference)
    compared = []
    for case in (*suite.cases, *suite.tasks):
        prompt = reference.prepare(case.prompt, case.images, lifted=case.lifted)
        if prompt.pixel_values is None or len(prompt.pixel_values) <= MAX_PATCHES:
            compared.append(_compared(case, prompt, sides))
    positions = joined(compared)
    drift = [float(x) for x in np.mean([one.drift for one in compared], axis=0)]
    facts: dict[str, Any] = {"positions": positions, "drift": drift}
    gates = list(_position_gates(positions, limits))
    worst = max((one for one in compared if one.case in suite.cases), key=lambda one: one.lead)
    played = sides.runner.not_run is None
    if played:
        facts["largest lead"] = worst.lead
        name = f"{worst.case.name}, PyTorch's lead"
        gates.append(Gate("generated tokens", name, worst.lead, limits.lead, worst.detail))
    gate, facts["perplexity"] = _perplexity(sides, limits)
    gates.append(gate)
    if suite.tasks and played:
        gate, facts["task"] = _task([one for one in compared if one.case in suite.tasks], sides, limits)
        gates.append(gate)
    return gates, facts


def joined(compared: Sequence[Compared]) -> dict[str, float | int]:
    """The figures over all positions."""
    kl, same = (np.concatenate([getattr(one, name) for one in compared]) for name in ("kl", "same"))
    return {
        "positions": len(kl),
        "kl mean": float(kl.mean()),
        "kl p99": float(np.quantile(kl, 0.99)),
        "kl max": float(kl.max()),
        "same top-1": float(same.mean()),
    }


def _compared(case: Case, prompt: Prompt, sides: Sides) -> Compared:
    """The bundle answers in its own runtime (PyTorch, where that is not here); both sides are given that answer."""
    reference, free = sides.reference, case.answer is not None
    if sides.runner.not_run is None:
        inputs = sides.runner.prepare(case.prompt, case.images)
        tokens = tuple(sides.runner.tokens(inputs, ANSWER, 0 if free else ANSWER))
    else:
        tokens = reference.generate(prompt, ANSWER, 0 if free else ANSWER).tokens
    ids = prompt.input_ids[0]
    (images,) = np.nonzero(ids == reference.image_token_id)
    seq = len(ids) + len(tokens) - 1
    keep = seq - (int(images[-1]) + 1 if len(images) else 0)
    got, streams = sides.forced(prompt, tokens[:-1])
    trace = reference.hidden_states(prompt, tokens[:-1], keep)
    q, p = log_softmax(got[-keep:]), log_softmax(trace.logits)
    logits = trace.logits[-len(tokens) :].copy()
    if not free:  # neither side could choose them
        logits[:, eos_token_ids(reference.checkpoint)] = -np.inf
    leads = logits.max(1) - logits[np.arange(len(tokens)), list(tokens)]
    at = int(leads.argmax())
    pairs = zip(streams, trace.decoder, strict=True)
    return Compared(
        case,
        tokens,
        kl=kl_divergence(p, q),
        same=q.argmax(1) == p.argmax(1),
        drift=[float(np.linalg.norm(a - b[0]) / np.linalg.norm(b[0])) for a, b in pairs],
        lead=float(leads[at]),
        detail=f"token {at} is {tokens[at]}, PyTorch {int(logits[at].argmax())}" if leads[at] > 0 else "",
    )


def _position_gates(found: dict[str, float | int], limits: Limits) -> Iterator[Gate]:
    name = f"{found['positions']} positions"
    yield Gate("KL divergence", f"mean of {name}", found["kl mean"], limits.kl_mean)
    yield Gate("KL divergence", f"99th percentile of {name}", found["kl p99"], limits.kl_p99)
    yield Gate("top-1 disagreement", f"share of {name}", 1 - found["same top-1"], round(1 - limits.same_top, 6))


def _perplexity(sides: Sides, limits: Limits) -> tuple[Gate, dict[str, Any]]:
    """On a text of the suite: exp of the mean negative log likelihood, the bundle's over PyTorch's."""
    ids = np.asarray(sides.runner.tokenizer.encode(PROSE.read_text(encoding="utf-8")).ids, np.int64)[None]
    line = np.arange(ids.shape[1], dtype=np.int64)
    prompt = Prompt(ids, None, None, np.broadcast_to(line, (3, *ids.shape)).copy())
    got, _ = sides.forced(prompt, ())
    want = sides.reference.logits(prompt, ())
    likelihoods = [log_softmax(side[:-1])[np.arange(ids.shape[1] - 1), ids[0, 1:]].mean() for side in (got, want)]
    mine, theirs = (float(np.exp(-mean)) for mean in likelihoods)
    facts = {"text": PROSE.name, "tokens": ids.shape[1], "bundle": mine, "PyTorch": theirs}
    return Gate("perplexity", f"ratio on {PROSE.name}, {ids.shape[1]} tokens", mine / theirs, limits.perplexity), facts


def _task(compared: Sequence[Compared], sides: Sides, limits: Limits) -> tuple[Gate, dict[str, Any]]:
    """Held-out answers that PyTorch gets right and the bundle does not."""
    lost, score = [], {"PyTorch": 0, "ONNX": 0}
    for one in compared:
        case, reference = one.case, sides.reference
        got = want = sides.runner.text(one.tokens)
        if one.lead > 0:  # else every token is PyTorch's own
            want = reference.text(reference.generate(reference.prepare(case.prompt, case.images), ANSWER).tokens)
        score["PyTorch"] += want == case.answer
        score["ONNX"] += got == case.answer
        if want == case.answer != got:
            lost.append(f"{case.name} {case.prompt!r}: {got!r}, PyTorch {want!r}")
    facts: dict[str, Any] = {key: f"{value}/{len(compared)}" for key, value in score.items()} | {"lost": len(lost)}
    name = f"lost of {score['PyTorch']} right answers; right: {score['ONNX']} of {len(compared)}"
    return Gate("held-out accuracy", name, float(len(lost)), float(limits.task_lost), "; ".join(lost[:3])), facts
