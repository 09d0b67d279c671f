"""Tokens end to end, in the runtime that a bundle is for, against `generate()`.

In: a bundle's folder, cases, the PyTorch reference. Out: gates on inputs and tokens.
Guaranteed: greedy on both sides, stop tokens barred until all tokens are there; a token that differs is a near tie only
where the reference's own lead is below `TIE` times the measured logit error, and then the rest is compared as well; a
runtime that throws fails the gate.
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

TIE = 4.0  # a lead below this multiple of the measured logit error is no lead
TIES_EVERY = 1000  # tokens, of which one may be a near tie


@dataclass(frozen=True)
class NearTies:
    """How many tokens were compared, and what were near ties."""

    compared: int
    found: tuple[str, ...]

    def gate(self, allowed: bool) -> Gate:
        """At most one in `TIES_EVERY` tokens; none where they are not allowed (a trained model has leads)."""
        limit = float(-(-self.compared // TIES_EVERY)) if allowed else 0.0
        return Gate("tokens", "near ties", float(len(self.found)), limit, "; ".join(self.found))


def counted(played: Sequence[tuple[Sequence[Gate], NearTies]]) -> dict[str, int]:
    """Over all cases of which tokens were compared: how many, and how many tokens came before one that differs."""
    some = [(gates, ties) for gates, ties in played if ties.compared]
    equal = 0.0
    for gates, ties in some:
        off = sum(gate.measured for gate in gates if gate.place.startswith("tokens"))
        equal += max(0.0, ties.compared - len(ties.found) - off)
    return {"cases": len(some), "compared": sum(ties.compared for _, ties in some), "equal": round(equal)}


def input_gates(name: str, inputs: Inputs, prompt: Prompt) -> list[Gate]:
    """Our own preprocessing against upstream's: token ids, pixel values, positions, all bit for bit."""
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
    """Greedy tokens from the image files on, and from the runtime's own processor where it has one.

    Args:
        logit_error: largest absolute difference of a logit in this case's decoder gates.
        tokens: how many, at most.
    """
    if runner.not_run is not None:
        return [], NearTies(0, ())
    name, tokens = case.name, min(tokens, case.max_new_tokens)
    found: list[tuple[list[Gate], list[str]]] = []
    common = (reference, logit_error, tokens)
    if "tokens" in case.checks:
        found.append(guarded_pair("tokens", name, file_gates, [], case, prompt, runner, *common))
    if runner.own is not None and case.images and "runtime" in case.checks and takes(runner.own, case):
        place = "tokens of the runtime's pixels"
        found.append(guarded_pair(place, name, runtime_gates, [], case, prompt, runner, runner.own, *common))
    gates = [gate for some, _ in found for gate in some]
    return gates, NearTies(tokens * len(found), tuple(tie for _, ties in found for tie in ties))


def takes(own: OwnProcessor, case: Case) -> bool:
    """Whether the runtime's own processor takes as many images as the case has."""
    return own.most_images is None or len(case.images) <= own.most_images


def file_gates(
    case: Case, prompt: Prompt, runner: Runner, reference: Reference, logit_error: float, tokens: int
) -> tuple[list[Gate], list[str]]:
    """Our own preprocessing, as `qwen3vl-onnx run` does it."""
    want = reference.generate(prompt, tokens, tokens)
    again = answer_from(runner, runner.prepare(case.prompt, case.images), want)

    def play(given: int) -> list[int]:
        got = again(given)
        if not given:
            show_answers(runner.text(got), reference.text(want.tokens))
        return got

    gate, ties = compare(f"{case.name}, {tokens} tokens", play, want, logit_error)
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
    """The runtime's own image processor, with our settings.

    Pixels are gated where upstream and the runtime see the same bytes: an RGB PNG that needs no resize. Elsewhere the
    decoders and resizers differ (README: Run a bundle), and tokens are compared with PyTorch fed the same pixels.
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
    again = answer_from(runner, inputs, want)

    def play(given: int) -> list[int]:
        return again(given) if given else list(own.tokens_of(tensors, inputs.input_ids.shape[1], tokens, tokens))

    gate, ties = compare(f"{case.name}, {tokens} tokens", play, want, logit_error)
    return [*gates, replace(gate, place="tokens of the runtime's pixels")], ties


def answer_from(runner: Runner, inputs: Inputs, want: Answer) -> Callable[[int], list[int]]:
    """Plays the rest of an answer of which the first `given` tokens are the reference's."""

    def play(given: int) -> list[int]:
        left = len(want.tokens) - given
        return list(runner.tokens(extended(inputs, want.tokens[:given]), left, left))

    return play


def compare(name: str, play: Callable[[int], list[int]], want: Answer, logit_error: float) -> tuple[Gate, list[str]]:
    """Token by token; behind a near tie the reference's tokens are given and the comparison goes on."""
    ties: list[str] = []
    given = 0
    while given < len(want.tokens):
        left = len(want.tokens) - given
        got = play(given)
        at = next((i for i, (a, b) in enumerate(zip(got, want.tokens[given:], strict=False)) if a != b), None)
        if at is None:
            off = abs(left - len(got))
            detail = f"{given + len(got)} tokens, expected {len(want.tokens)}" if off else ""
            return Gate("tokens", name, float(off), 0.0, detail), ties
        position, margin = given + at, want.margins[given + at]
        told = f"{name}: token {position} is {got[at]}, PyTorch {want.tokens[position]} with a lead of {margin:.2e}"
        if not margin < TIE * logit_error:
            return Gate("tokens", name, float(left - at), 0.0, told), ties
        ties.append(told)
        given = position + 1
    return Gate("tokens", name, 0.0, 0.0), ties


def extended(inputs: Inputs, tokens: Sequence[int]) -> Inputs:
    """The same prompt with an answer begun: ids appended, positions counted on."""
    seq = inputs.input_ids.shape[1]
    ids = np.concatenate([inputs.input_ids, np.asarray(tokens, np.int64)[None]], axis=1)
    further = np.arange(seq, ids.shape[1], dtype=np.int64) + inputs.rope_delta
    positions = np.concatenate([inputs.position_ids, np.broadcast_to(further, (3, 1, len(tokens)))], axis=2)
    return replace(inputs, input_ids=ids, position_ids=positions)
