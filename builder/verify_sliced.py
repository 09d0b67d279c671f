"""Prove that a bundle equals PyTorch where neither fits in memory: layer by layer on both sides.

In: a configured folder (or a bundle) and a streamed reference. Out: a `Report` with a gate for every layer.
Guaranteed: PyTorch holds one layer at a time, ONNX Runtime one slice of a graph, in a process of its own; every node of
every graph runs; the first layer whose residual stream leaves the tolerance is named; tokens in the bundle's own
runtime are compared where its weights fit, and where not the report says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from builder import memory
from builder.cases import Case, shipped_cases
from builder.console import progress
from builder.contract import DECODER, EMBEDDINGS, RESIDUAL, VISION, components
from builder.estimate import VERIFY_MEMORY
from builder.figures import size
from builder.gates import FP32, Gate, Report, attempted, close, exact, uncomputed
from builder.graphs import merged
from builder.pipeline import Inputs, load_tokenizer, prepare, read_image_settings, read_settings
from builder.reference import Prompt, Reference, Trace
from builder.slices import Values, run_slices, sliced
from builder.stored import traced
from builder.targets.settings import eos_token_ids
from builder.verify_tokens import TIE, Ties, open_player

CASES = ("text", "one picture", "wide, tall")
TOKENS = 16
SLICE = 10**9  # bytes of weights in one slice, if the memory allows as much
TWICE = 2  # a slice's peak over its weights: ONNX Runtime packs some while it still holds those that it read
RUNNING = 1.25  # a whole bundle's peak over its data files (2B: 9.9 GB over 8.5 GB)


@dataclass(frozen=True)
class Asked:
    """A case, its inputs as PyTorch and as the bundle's own preprocessing give them, and what PyTorch made of them."""

    case: Case
    prompt: Prompt
    inputs: Inputs
    trace: Trace


def verify_sliced(
    folder: Path,
    target: str,
    reference: Reference,
    limit: int,
    store: Path,
    cases: Sequence[Case] | None = None,
) -> Report:
    """All gates of one folder.

    Args:
        limit: bytes of memory that a process may take.
        store: where the reference's outputs are kept.
        cases: what to ask; `CASES` if None.

    Raises:
        BundleError: a graph or a setting that its runtime cannot open.
    """
    chosen = [case for case in shipped_cases() if case.name in CASES] if cases is None else cases
    with progress(f"verify {target} in slices", len(chosen) + 4) as advance:
        asked = []
        for case in chosen:
            asked.append(_asked(case, folder, reference, store))
            advance()
        graphs = _Sliced(folder, target, reference, min(SLICE, max(1, (limit - VERIFY_MEMORY) // TWICE)))
        gates = [gate for one in asked for gate in _input_gates(one)]
        for place, compute in (
            ("vision layers", graphs.vision_gates),
            ("embeddings", graphs.embedding_gates),
            ("decoder layers", graphs.decoder_gates),
        ):
            gates += attempted(place, "in slices", compute, asked)
            advance()
        told, not_run = _tokens(folder, target, reference, asked, gates, limit)
        advance()
    facts = {
        "versions": {name: version(name) for name in ("torch", "transformers", "onnxruntime", "numpy")},
        "peak_rss": max(graphs.peak, memory.peak_rss() or 0),
        "cases": [one.case.name for one in asked],
    }
    return Report(target, reference.checkpoint.name, (*gates, *told), facts, not_run)


def _asked(case: Case, folder: Path, reference: Reference, store: Path) -> Asked:
    settings, vision = read_settings(folder / "pipeline.json"), read_image_settings(folder / "vision_processor.json")
    inputs = prepare(case.prompt, case.images, load_tokenizer(folder / "tokenizer.json"), settings, vision)
    prompt = reference.prepare(case.prompt, case.images)
    return Asked(case, prompt, inputs, traced(reference, prompt, store))


def _input_gates(asked: Asked) -> list[Gate]:
    name, prompt, inputs = asked.case.name, asked.prompt, asked.inputs
    gates = [exact("token ids", name, inputs.input_ids, prompt.input_ids)]
    if prompt.pixel_values is not None:
        assert inputs.pixel_values is not None
        gates.append(exact("pixel values", name, inputs.pixel_values, prompt.pixel_values))
    return [*gates, exact("position ids", name, inputs.position_ids, prompt.position_ids)]


class _Sliced:
    """The three graphs of a folder, run slice by slice on the reference's own inputs."""

    def __init__(self, folder: Path, target: str, reference: Reference, budget: int) -> None:
        self.folder, self.reference, self.budget = folder, reference, budget
        self.packed = target == "genai"
        self.ports = {component.name: component for component in components(reference.checkpoint, target)}
        self.levels = len(reference.checkpoint.vision.deepstack)
        self.peak = 0

    def vision_gates(self, asked: Sequence[Asked]) -> list[Gate]:
        """The residual stream behind each block, then main and DeepStack features."""
        seen = [one for one in asked if one.prompt.pixel_values is not None and one.prompt.image_grid_thw is not None]
        calls = [[{"pixel_values": o.prompt.pixel_values, "image_grid_thw": o.prompt.image_grid_thw}] for o in seen]
        gates = []
        for one, (values,) in zip(seen, self._run(VISION, calls), strict=True):  # type: ignore[arg-type]
            name, places = one.case.name, ("image features", *["deepstack features"] * self.levels)
            gates += _layers("vision layers", name, values, one.trace.vision, slice(None))
            got = self._features(values)
            for place, a, b in zip(places, got, one.trace.features, strict=True):
                gates.append(close(place, name, a, b, FP32))
        return gates

    def embedding_gates(self, asked: Sequence[Asked]) -> list[Gate]:
        """The lookup (and, in a packed graph, the merge and the scatter)."""
        calls = []
        for one in asked:
            call: Values = {"input_ids": one.prompt.input_ids}
            if self.packed:
                call["image_features"] = np.concatenate(self._reference_features(one), axis=-1)
            calls.append([call])
        gates = []
        for one, (values,) in zip(asked, self._run(EMBEDDINGS, calls), strict=True):
            main, levels = self._merged(one)
            if self.packed:
                want = np.concatenate([main, *levels], axis=-1)
            else:
                want = self.reference.embed(one.prompt.input_ids)
            gates.append(close("embeddings", one.case.name, values["inputs_embeds"], want, FP32))
        return gates

    def decoder_gates(self, asked: Sequence[Asked]) -> list[Gate]:
        """Prefill, a chunk of four tokens on that past, two single steps: every layer's stream, then the logits."""
        spans = [_spans(one.prompt.input_ids.shape[1]) for one in asked]
        calls = [
            [self._decoder_call(one, begin, end) for _, begin, end in row]
            for one, row in zip(asked, spans, strict=True)
        ]
        layers, logits = [], []
        for one, row, results in zip(asked, spans, self._run(DECODER, calls), strict=True):
            for (place, begin, end), values in zip(row, results, strict=True):
                name, part = f"{one.case.name}, tokens {begin}–{end}", slice(begin, end)
                layers += _layers("decoder layers", name, values, [x[0] for x in one.trace.decoder], part)
                want = one.trace.logits[end - 1 : end] if self.packed else one.trace.logits[part]
                logits.append(close(place, name, values["logits"][0], want, FP32))
        return layers + logits

    def _decoder_call(self, one: Asked, begin: int, end: int) -> Values:
        main, levels = self._merged(one)
        part = slice(begin, end)
        call: Values = {
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": one.prompt.position_ids[:, :, part],
            "inputs_embeds": main[:, part],
        }
        pieces = [level[:, part] for level in levels]
        if self.packed:
            call["inputs_embeds"] = np.concatenate([main[:, part], *pieces], axis=-1)
        elif pieces:
            call["deepstack_embeds"] = np.stack(pieces)
        return call

    def _merged(self, one: Asked) -> tuple[np.ndarray, list[np.ndarray]]:
        ids = one.prompt.input_ids
        main, *levels = self._reference_features(one)
        return merged(self.reference.embed(ids), ids == self.reference.image_token_id, main, levels)

    def _reference_features(self, one: Asked) -> list[np.ndarray]:
        empty = np.zeros((0, self.reference.checkpoint.text.hidden), np.float32)
        return list(one.trace.features) or [empty] * (1 + self.levels)

    def _features(self, values: Values) -> list[np.ndarray]:
        if not self.packed:
            return [values["pooled_embeds"], *(values["deepstack_features"] if self.levels else ())]
        return np.split(values["image_features"], 1 + self.levels, axis=-1)

    def _run(self, name: str, calls: list[list[Values]]) -> list[list[Values]]:
        if not calls:
            return []
        results, peak = run_slices(sliced(self.folder / f"{name}.onnx", self.budget), self.folder, calls)
        self.peak = max(self.peak, peak)
        return results


def _layers(place: str, name: str, values: Values, want: Sequence[np.ndarray], part: slice) -> list[Gate]:
    """The residual stream behind each layer; a graph that does not name one cannot be compared there."""
    gates = []
    for layer, stream in enumerate(want):
        got = values.get(f"{RESIDUAL}.{layer}")
        case = f"{name}, layer {layer}"
        if got is None:
            gates.append(uncomputed(place, case, KeyError(f"the graph has no {RESIDUAL}.{layer}")))
        else:
            gates.append(close(place, case, got.reshape(-1, got.shape[-1]), stream[part], FP32))
    return gates


def _spans(seq: int) -> list[tuple[str, int, int]]:
    cuts = [0, seq - 6, seq - 2, seq - 1, seq]
    places = ("decoder prefill", "decoder chunk", "decoder step", "decoder step")
    return list(zip(places, cuts, cuts[1:], strict=False))


def _tokens(
    folder: Path, target: str, reference: Reference, asked: Sequence[Asked], gates: Sequence[Gate], limit: int
) -> tuple[list[Gate], dict[str, str]]:
    """Greedy tokens of the bundle's own runtime, each of which PyTorch must give after those before it."""
    needed = VERIFY_MEMORY + round(RUNNING * sum(file.stat().st_size for file in folder.glob("*.data")))
    if needed > limit:
        return [], {"tokens": f"needs {size(needed)} of memory, there are {size(limit)}"}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        played = pool.submit(_played, folder, target, [one.case for one in asked]).result()
    told: list[Gate] = []
    ties: list[str] = []
    for one, tokens in zip(asked, played, strict=True):
        if isinstance(tokens, str):
            told.append(Gate("tokens", one.case.name, float("inf"), 0.0, tokens))
            continue
        logits = reference.hidden_states(one.prompt, tokens[:-1], keep=len(tokens)).logits
        error = _logit_error(gates, one)
        gate, near = forced(
            f"{one.case.name}, {len(tokens)} tokens", tokens, logits, error, eos_token_ids(reference.checkpoint)
        )
        told.append(gate)
        ties += near
    return [*told, Ties(TOKENS * len(asked), tuple(ties)).gate(allowed=True)], {}


def forced(
    name: str, tokens: Sequence[int], logits: np.ndarray, logit_error: float, barred: Sequence[int]
) -> tuple[Gate, list[str]]:
    """Whether each token is the likeliest after those before it, which makes the row `generate()`'s.

    Args:
        logits: [len(tokens), vocab], the reference's, at the positions that the tokens were made from.
        logit_error: a lead of the reference below four times this is a tie.
        barred: stop tokens, which neither side could choose.
    """
    ties: list[str] = []
    for position, (token, row) in enumerate(zip(tokens, logits.copy(), strict=True)):
        row[list(barred)] = -np.inf
        second, first = np.argsort(row)[-2:]
        if token == first:
            continue
        lead = float(row[first] - row[second])
        said = f"{name}: token {position} is {token}, PyTorch {first} with a lead of {lead:.2e}"
        if token != second or not lead < TIE * logit_error:
            return Gate("tokens", name, float(len(tokens) - position), 0.0, said), ties
        ties.append(said)
    return Gate("tokens", name, 0.0, 0.0), ties


def _logit_error(gates: Sequence[Gate], one: Asked) -> float:
    measured = [gate.measured for gate in gates if gate.place.startswith("decoder ") and gate.place != "decoder layers"]
    return min(max(measured, default=0.0), FP32) * float(one.trace.logits.std())


def _played(folder: Path, target: str, cases: Sequence[Case]) -> list[tuple[int, ...] | str]:
    """Tokens of each case, or what the runtime said instead; in a process of its own."""
    player = open_player(folder, target)
    rows: list[tuple[int, ...] | str] = []
    for case in cases:
        try:
            inputs = player.prepare(case.prompt, case.images)
            rows.append(tuple(player.tokens(inputs, TOKENS, TOKENS)))
        except Exception as error:  # each runtime throws errors of its own for what its graphs cannot take
            rows.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    return rows
