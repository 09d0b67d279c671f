"""Measure the quality of a lossy bundle against PyTorch in fp32.

Both models are teacher-forced on the same tokens and compute their own image features; every position after the last
image is compared. Measured: KL divergence of the next-token distribution (nats), top-1 agreement, the ratio of
perplexities on builder/suite/prose.txt, the drift of the residual stream after each layer, held-out accuracy, and the
largest lead of PyTorch's top-1 token over a token that the bundle generated.
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
from builder.verify.graphs.all_logits import shipped_graphs, teacher_forced
from builder.verify.graphs.sessions import Graphs
from builder.verify.report.gates import Gate

PROSE = SUITE / "prose.txt"
ANSWER = 16  # tokens of an answer

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class CaseQuality:
    """The quality of one case.

    Args:
        tokens: the bundle's answer, greedy, in its own runtime.
        kl: [positions], in nats.
        same: [positions] bool, whether the top-1 token is the same.
        drift: of the residual stream after each layer: |difference| / |PyTorch's|.
        lead: the largest lead of PyTorch's top-1 token over a token of the answer, in logits; 0 if all are equal.
        detail: the token with that lead; "" if there is none.
    """

    case: Case
    tokens: tuple[int, ...]
    kl: Array
    same: Array
    drift: list[float]
    lead: float
    detail: str


@dataclass(frozen=True)
class ModelPair:
    """A bundle, in plain sessions and in its own runtime, and its PyTorch reference."""

    graphs: Graphs
    runner: Runner
    reference: Reference

    @classmethod
    def open(cls, folder: Path, target: str, reference: Reference) -> ModelPair:
        """Open both forms of the bundle in `folder`."""
        graphs = shipped_graphs(folder, target, reference.checkpoint.text.hidden)
        return cls(graphs, open_runner(folder, target), reference)

    def teacher_forced(self, prompt: Prompt, answer: Sequence[int]) -> tuple[Array, list[Array]]:
        """Return the bundle's logits [seq, vocab], and its residual streams, [seq, H] each."""
        return teacher_forced(self.graphs, prompt, answer, self.reference.image_token_id)


def quality_gates(
    folder: Path,
    target: str,
    reference: Reference,
    limits: Limits,
    suite: Suite,
) -> tuple[list[Gate], dict[str, Any]]:
    """Return the gates of the bundle in `folder`, and the measurements for the report."""
    pair = ModelPair.open(folder, target, reference)
    results = []
    for case in (*suite.cases, *suite.tasks):
        prompt = reference.prepare(case.prompt, case.images, lifted=case.lifted)
        if prompt.pixel_values is None or len(prompt.pixel_values) <= MAX_PATCHES:
            results.append(_case_quality(case, prompt, pair))
    positions = joined(results)
    drift = [float(x) for x in np.mean([result.drift for result in results], axis=0)]
    facts: dict[str, Any] = {"positions": positions, "drift": drift}
    gates = list(_position_gates(positions, limits))
    worst = max((result for result in results if result.case in suite.cases), key=lambda result: result.lead)
    generates = pair.runner.not_run is None
    if generates:
        facts["largest lead"] = worst.lead
        name = f"{worst.case.name}, PyTorch's lead"
        gates.append(Gate("generated tokens", name, worst.lead, limits.lead, worst.detail))
    gate, facts["perplexity"] = _perplexity(pair, limits)
    gates.append(gate)
    if suite.tasks and generates:
        gate, facts["task"] = _task([result for result in results if result.case in suite.tasks], pair, limits)
        gates.append(gate)
    return gates, facts


def joined(results: Sequence[CaseQuality]) -> dict[str, float | int]:
    """Summarize KL divergence and top-1 agreement over all positions."""
    kl, same = (np.concatenate([getattr(result, name) for result in results]) for name in ("kl", "same"))
    return {
        "positions": len(kl),
        "kl mean": float(kl.mean()),
        "kl p99": float(np.quantile(kl, 0.99)),
        "kl max": float(kl.max()),
        "same top-1": float(same.mean()),
    }


def _case_quality(case: Case, prompt: Prompt, pair: ModelPair) -> CaseQuality:
    """Generate an answer in the bundle's own runtime (in PyTorch without it), and teacher-force both models on it."""
    reference, free = pair.reference, case.answer is not None
    if pair.runner.not_run is None:
        inputs = pair.runner.prepare(case.prompt, case.images)
        tokens = tuple(pair.runner.tokens(inputs, ANSWER, 0 if free else ANSWER))
    else:
        tokens = reference.generate(prompt, ANSWER, 0 if free else ANSWER).tokens
    ids = prompt.input_ids[0]
    (images,) = np.nonzero(ids == reference.image_token_id)
    seq = len(ids) + len(tokens) - 1
    keep = seq - (int(images[-1]) + 1 if len(images) else 0)
    got, streams = pair.teacher_forced(prompt, tokens[:-1])
    trace = reference.hidden_states(prompt, tokens[:-1], keep)
    q, p = log_softmax(got[-keep:]), log_softmax(trace.logits)
    logits = trace.logits[-len(tokens) :].copy()
    if not free:  # stop tokens were suppressed
        logits[:, eos_token_ids(reference.checkpoint)] = -np.inf
    leads = logits.max(1) - logits[np.arange(len(tokens)), list(tokens)]
    at = int(leads.argmax())
    pairs = zip(streams, trace.decoder, strict=True)
    return CaseQuality(
        case,
        tokens,
        kl=kl_divergence(p, q),
        same=q.argmax(1) == p.argmax(1),
        drift=[float(np.linalg.norm(a - b[0]) / np.linalg.norm(b[0])) for a, b in pairs],
        lead=float(leads[at]),
        detail=f"token {at} is {tokens[at]}, PyTorch {int(logits[at].argmax())}" if leads[at] > 0 else "",
    )


def _position_gates(figures: dict[str, float | int], limits: Limits) -> Iterator[Gate]:
    name = f"{figures['positions']} positions"
    yield Gate("KL divergence", f"mean of {name}", figures["kl mean"], limits.kl_mean)
    yield Gate("KL divergence", f"99th percentile of {name}", figures["kl p99"], limits.kl_p99)
    yield Gate("top-1 disagreement", f"share of {name}", 1 - figures["same top-1"], round(1 - limits.same_top, 6))


def _perplexity(pair: ModelPair, limits: Limits) -> tuple[Gate, dict[str, Any]]:
    """Compare perplexities on a text of the suite: exp of the mean negative log-likelihood."""
    ids = np.asarray(pair.runner.tokenizer.encode(PROSE.read_text(encoding="utf-8")).ids, np.int64)[None]
    line = np.arange(ids.shape[1], dtype=np.int64)
    prompt = Prompt(ids, None, None, np.broadcast_to(line, (3, *ids.shape)).copy())
    got, _ = pair.teacher_forced(prompt, ())
    want = pair.reference.logits(prompt, ())
    likelihoods = [log_softmax(logits[:-1])[np.arange(ids.shape[1] - 1), ids[0, 1:]].mean() for logits in (got, want)]
    mine, theirs = (float(np.exp(-mean)) for mean in likelihoods)
    facts = {"text": PROSE.name, "tokens": ids.shape[1], "bundle": mine, "PyTorch": theirs}
    return Gate("perplexity", f"ratio on {PROSE.name}, {ids.shape[1]} tokens", mine / theirs, limits.perplexity), facts


def _task(results: Sequence[CaseQuality], pair: ModelPair, limits: Limits) -> tuple[Gate, dict[str, Any]]:
    """Count held-out answers that PyTorch gets right and the bundle gets wrong."""
    lost, score = [], {"PyTorch": 0, "ONNX": 0}
    for result in results:
        case, reference = result.case, pair.reference
        got = want = pair.runner.text(result.tokens)
        if result.lead > 0:  # otherwise every token is PyTorch's own
            want = reference.text(reference.generate(reference.prepare(case.prompt, case.images), ANSWER).tokens)
        score["PyTorch"] += want == case.answer
        score["ONNX"] += got == case.answer
        if want == case.answer != got:
            lost.append(f"{case.name} {case.prompt!r}: {got!r}, PyTorch {want!r}")
    facts: dict[str, Any] = {key: f"{value}/{len(results)}" for key, value in score.items()} | {"lost": len(lost)}
    name = f"lost of {score['PyTorch']} right answers; right: {score['ONNX']} of {len(results)}"
    return Gate("held-out accuracy", name, float(len(lost)), float(limits.task_lost), "; ".join(lost[:3])), facts
