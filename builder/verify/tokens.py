"""Compare greedy tokens of a bundle's own runtime with PyTorch's `generate()`.

Stop tokens are suppressed on both sides. A differing token is a near tie only if PyTorch's lead is below `TIE` times
the measured logit error; the comparison then goes on from PyTorch's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from builder.reference.cases import TOKENS, Case
from builder.reference.model import Answer, Prompt, Reference
from builder.targets.clients.pipeline import Inputs
from builder.targets.runners.protocol import OwnProcessor, Runner
from builder.verify.report.exhibits import show_answers, show_pixels
from builder.verify.report.gates import Gate, compare_exact, guarded_pair

TIE = 4.0  # a lead below this multiple of the measured logit error is a near tie
TIES_EVERY = 1000  # tokens per near tie allowed


@dataclass(frozen=True)
class NearTies:
    """The number of tokens compared, and a description of each near tie."""

    compared: int
    found: tuple[str, ...]

    def gate(self, allowed: bool) -> Gate:
        """Return a gate on near ties: at most one in `TIES_EVERY` tokens, or none (a trained model has clear leads)."""
        limit = float(-(-self.compared // TIES_EVERY)) if allowed else 0.0
        return Gate("tokens", "near ties", float(len(self.found)), limit, "; ".join(self.found))


def count_equal_tokens(results: Sequence[tuple[Sequence[Gate], NearTies]]) -> dict[str, int]:
    """Count, over all cases with tokens, the tokens compared and those before the first that differs."""
    with_tokens = [(gates, ties) for gates, ties in results if ties.compared]
    equal = 0.0
    for gates, ties in with_tokens:
        off = sum(gate.measured for gate in gates if gate.place.startswith("tokens"))
        equal += max(0.0, ties.compared - len(ties.found) - off)
    compared = sum(ties.compared for _, ties in with_tokens)
    return {"cases": len(with_tokens), "compared": compared, "equal": round(equal)}


def input_gates(name: str, inputs: Inputs, prompt: Prompt) -> list[Gate]:
    """Compare the bundle's preprocessing with transformers' bitwise: token ids, pixel values, positions."""
    gates = [compare_exact("token ids", name, inputs.input_ids, prompt.input_ids)]
    if prompt.pixel_values is not None:
        assert inputs.pixel_values is not None
        gates.append(compare_exact("pixel values", name, inputs.pixel_values, prompt.pixel_values))
        show_pixels(
            "preprocessing of the bundle",
            inputs.pixel_values,
            prompt.pixel_values,
            inputs.image_grid_thw,
            prompt.image_grid_thw,
        )
    return [*gates, compare_exact("position ids", name, inputs.position_ids, prompt.position_ids)]


def token_gates(
    case: Case, prompt: Prompt, runner: Runner, reference: Reference, logit_error: float, tokens: int = TOKENS
) -> tuple[list[Gate], NearTies]:
    """Compare greedy tokens from the image files on, and from the runtime's own processor if it has one.

    Args:
        logit_error: largest absolute difference of a logit in this case's decoder gates.
        tokens: maximum number.
    """
    if runner.not_run is not None:
        return [], NearTies(0, ())
    name, tokens = case.name, min(tokens, case.max_new_tokens)
    results: list[tuple[list[Gate], list[str]]] = []
    common = (reference, logit_error, tokens)
    if "tokens" in case.checks:
        results.append(guarded_pair("tokens", name, file_gates, [], case, prompt, runner, *common))
    if runner.own is not None and case.images and "runtime" in case.checks and takes(runner.own, case):
        place = "tokens of the runtime's pixels"
        results.append(guarded_pair(place, name, runtime_gates, [], case, prompt, runner, runner.own, *common))
    gates = [gate for compared, _ in results for gate in compared]
    return gates, NearTies(tokens * len(results), tuple(tie for _, ties in results for tie in ties))


def takes(own: OwnProcessor, case: Case) -> bool:
    """Return whether the runtime's own processor takes as many images as the case has."""
    return own.most_images is None or len(case.images) <= own.most_images


def file_gates(
    case: Case, prompt: Prompt, runner: Runner, reference: Reference, logit_error: float, tokens: int
) -> tuple[list[Gate], list[str]]:
    """Compare tokens from the bundle's own preprocessing, as in `qwen3vl-onnx run`."""
    want = reference.generate(prompt, tokens, tokens)
    continuation = answer_from(runner, runner.prepare(case.prompt, case.images), want)

    def run(given: int) -> list[int]:
        got = continuation(given)
        if not given:
            show_answers(runner.text(got), reference.text(want.tokens))
        return got

    gate, ties = compare_tokens(f"{case.name}, {tokens} tokens", run, want, logit_error)
    return [gate], ties


def runtime_gates(
    case: Case,
    prompt: Prompt,
    runner: Runner,
    own: OwnProcessor,
    reference: Reference,
    logit_error: float,
    tokens: int,
) -> tuple[list[Gate], list[str]]:
    """Compare tokens from the runtime's own image processor, with our settings.

    Pixels are compared only for an RGB PNG that needs no resize. Otherwise decoders and resizers differ, and tokens are
    compared with PyTorch given the same pixels.
    """
    tensors, inputs = own.runtime_inputs(case.prompt, case.images)
    show_pixels(
        "the runtime's own processor",
        inputs.pixel_values,
        prompt.pixel_values,
        inputs.image_grid_thw,
        prompt.image_grid_thw,
    )
    gates = []
    if all(own.at_target_size(path) for path in case.images):
        assert inputs.pixel_values is not None
        assert prompt.pixel_values is not None
        gates.append(compare_exact("runtime's pixel values", case.name, inputs.pixel_values, prompt.pixel_values))
    fed = reference.with_pixels(case.prompt, len(case.images), inputs.pixel_values, inputs.image_grid_thw)
    gates.append(compare_exact("token ids", f"{case.name}, runtime's tokenizer", inputs.input_ids, fed.input_ids))
    want = reference.generate(fed, tokens, tokens)
    continuation = answer_from(runner, inputs, want)

    def run(given: int) -> list[int]:
        return continuation(given) if given else list(own.tokens_of(tensors, inputs.input_ids.shape[1], tokens, tokens))

    gate, ties = compare_tokens(f"{case.name}, {tokens} tokens", run, want, logit_error)
    return [*gates, replace(gate, place="tokens of the runtime's pixels")], ties


def answer_from(runner: Runner, inputs: Inputs, want: Answer) -> Callable[[int], list[int]]:
    """Return a function that generates the rest of an answer after its first `given` reference tokens."""

    def run(given: int) -> list[int]:
        left = len(want.tokens) - given
        return list(runner.tokens(extended(inputs, want.tokens[:given]), left, left))

    return run


def compare_tokens(
    name: str, run: Callable[[int], list[int]], want: Answer, logit_error: float
) -> tuple[Gate, list[str]]:
    """Compare token by token; after a near tie, go on from the reference's tokens."""
    ties: list[str] = []
    given = 0
    while given < len(want.tokens):
        left = len(want.tokens) - given
        got = run(given)
        at = next((i for i, (a, b) in enumerate(zip(got, want.tokens[given:], strict=False)) if a != b), None)
        if at is None:
            off = abs(left - len(got))
            detail = f"{given + len(got)} tokens, expected {len(want.tokens)}" if off else ""
            return Gate("tokens", name, float(off), 0.0, detail), ties
        position, margin = given + at, want.margins[given + at]
        difference = (
            f"{name}: token {position} is {got[at]}, PyTorch {want.tokens[position]} with a lead of {margin:.2e}"
        )
        if not margin < TIE * logit_error:
            return Gate("tokens", name, float(left - at), 0.0, difference), ties
        ties.append(difference)
        given = position + 1
    return Gate("tokens", name, 0.0, 0.0), ties


def extended(inputs: Inputs, tokens: Sequence[int]) -> Inputs:
    """Append tokens of an answer to a prompt, with their positions."""
    seq = inputs.input_ids.shape[1]
    ids = np.concatenate([inputs.input_ids, np.asarray(tokens, np.int64)[None]], axis=1)
    further = np.arange(seq, ids.shape[1], dtype=np.int64) + inputs.rope_delta
    positions = np.concatenate([inputs.position_ids, np.broadcast_to(further, (3, 1, len(tokens)))], axis=2)
    return replace(inputs, input_ids=ids, position_ids=positions)
