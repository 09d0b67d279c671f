"""Prove that a bundle equals PyTorch where neither fits in memory: layer by layer on both sides.

In: a configured folder (or a bundle) and a streamed reference. Out: a `Report` with a gate for every layer.
Guaranteed: PyTorch holds one layer at a time, ONNX Runtime one slice of a graph, in a process of its own; every node of
every graph runs; the first layer whose residual stream leaves the tolerance is named; tokens in the bundle's own
runtime are compared where its weights fit, and where not the report says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from builder.bundle.layout import data_files
from builder.reference.cases import Case, Suite, layerwise, shipped_cases
from builder.reference.model import Reference
from builder.reference.trace_cache import traced
from builder.targets.clients.pipeline import load_tokenizer, prepare, read_image_settings, read_settings
from builder.targets.config_files import eos_token_ids
from builder.targets.runners.registry import RUNTIMES, open_runner
from builder.util import peak_memory
from builder.util.errors import CasesError
from builder.util.progress import progress
from builder.util.units import size
from builder.verify.graphs.compare import ReferenceCase, TraceCase, in_order, logit_error
from builder.verify.graphs.per_layer import SlicedGraphs, TraceComparison
from builder.verify.image_preprocessor import preprocessor_gates
from builder.verify.memory_budget import SLICE, VERIFY_MEMORY
from builder.verify.report.exhibits import collecting, show_case
from builder.verify.report.gates import Gate, Report, guarded
from builder.verify.tokens import TIE, NearTies, counted, input_gates
from builder.verify.tolerances import limit

TOKENS = 16
TWICE = 2  # a slice's peak over its weights: ONNX Runtime packs some while it still holds those that it read
RUNNING = 1.25  # a whole bundle's peak over its data files (2B: 9.9 GB over 8.5 GB)


def verify_layerwise(
    folder: Path,
    target: str,
    reference: Reference,
    memory: int,
    store: Path,
    cases: Sequence[Case] | None = None,
    *,
    fail_fast: bool = False,
) -> Report:
    """All gates of one folder.

    Args:
        memory: bytes that a process may use.
        store: where the reference's outputs are kept.
        cases: what to compare; the shipped cases tagged "layerwise" if None.
        fail_fast: stop after the first place that fails.

    Raises:
        BundleError: a graph or a setting that its runtime cannot open.
    """
    chosen = layerwise(shipped_cases()) if cases is None else cases
    sizes = reference.checkpoint.vision
    with progress(f"verify {target} in slices", len(chosen) + 4) as advance, collecting(sizes) as exhibits:
        asked, gates = [], []
        for case in chosen:
            one, compared = _asked(case, folder, reference, store)
            asked.append(one)
            gates += compared
            advance()
        gates += preprocessor_gates(folder, target, reference)
        graphs = SlicedGraphs(folder, target, reference.checkpoint.text.hidden, slice_budget(memory))
        comparison = TraceComparison(graphs, reference)
        ended = False
        for place, compute in (
            ("vision layers", comparison.vision_gates),
            ("embeddings", comparison.embedding_gates),
            ("decoder layers", comparison.decoder_gates),
        ):
            ended = ended or (fail_fast and not all(gate.ok for gate in gates))
            gates += [] if ended else guarded(place, "in slices", in_order, compute, asked)
            advance()
        not_run: dict[str, str] = {}
        if not (fail_fast and not all(gate.ok for gate in gates)):
            told, not_run = _tokens(folder, target, reference, chosen, asked, gates, memory)
            gates += told
        advance()
    versions = {name: version(name) for name in ("torch", "transformers", "onnxruntime", "numpy")}
    facts: dict[str, object] = {
        "versions": versions | dict(RUNTIMES[target].versions()),
        "peak_rss": max(graphs.peak, peak_memory.peak_rss() or 0),
        "cases": [one.name for one in asked],
    }
    if "tokens" not in not_run:
        facts["tokens"] = {**counted([(gates, NearTies(TOKENS * len(asked), ()))]), "cases": len(asked)}
    return Report(target, reference.checkpoint.name, tuple(gates), facts, not_run, exhibits())


def for_slices(suite: Suite) -> tuple[Case, ...]:
    """The cases that are compared layer by layer.

    Raises:
        CasesError: a case leaves checks out, which a comparison in slices cannot do.
    """
    chosen = layerwise(suite.cases)
    for case in chosen:
        if case.unchecked:
            raise CasesError(
                f"case {case.name!r} leaves checks out, but this model is compared in slices, which makes all of them",
                expected="no `checks` and no `limits`",
                found=f"without {', '.join(case.unchecked)}",
                next="leave that file out, or give more --memory",
            )
    return chosen


def slice_budget(memory: int) -> int:
    """Bytes of weights in one slice, where a process may use `memory` bytes."""
    return min(SLICE, max(1, (memory - VERIFY_MEMORY) // TWICE))


def _asked(case: Case, folder: Path, reference: Reference, store: Path) -> tuple[TraceCase, list[Gate]]:
    """The case, and its inputs as the bundle's own preprocessing gives them against PyTorch's."""
    settings, vision = read_settings(folder / "pipeline.json"), read_image_settings(folder / "vision_processor.json")
    inputs = prepare(case.prompt, case.images, load_tokenizer(folder / "tokenizer.json"), settings, vision)
    prompt = reference.prepare(case.prompt, case.images)
    show_case(case.name, case.prompt, case.images)
    return ReferenceCase(case.name, prompt, traced(reference, prompt, store), limit(case)), input_gates(
        case.name, inputs, prompt
    )


def _tokens(
    folder: Path,
    target: str,
    reference: Reference,
    cases: Sequence[Case],
    asked: Sequence[TraceCase],
    gates: Sequence[Gate],
    memory: int,
) -> tuple[list[Gate], dict[str, str]]:
    """Greedy tokens of the bundle's own runtime, each of which PyTorch must give after those before it."""
    if why := RUNTIMES[target].missing():
        return [], {"tokens": why}
    needed = VERIFY_MEMORY + round(RUNNING * sum(file.stat().st_size for file in data_files(folder)))
    if needed > memory:
        return [], {"tokens": f"needs {size(needed)} of memory, there are {size(memory)}"}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        played = pool.submit(_played, folder, target, list(cases)).result()
    told: list[Gate] = []
    ties: list[str] = []
    for one, tokens in zip(asked, played, strict=True):
        if isinstance(tokens, str):
            told.append(Gate("tokens", one.name, float("inf"), 0.0, tokens))
            continue
        logits = reference.hidden_states(one.prompt, tokens[:-1], keep=len(tokens)).logits
        error = logit_error(gates, one.limit, float(one.expected.logits.std()))
        gate, near = forced(
            f"{one.name}, {len(tokens)} tokens", tokens, logits, error, eos_token_ids(reference.checkpoint)
        )
        told.append(gate)
        ties += near
    return [*told, NearTies(TOKENS * len(asked), tuple(ties)).gate(allowed=True)], {}


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


def _played(folder: Path, target: str, cases: Sequence[Case]) -> list[tuple[int, ...] | str]:
    """Tokens of each case, or what the runtime said instead; in a process of its own."""
    runner = open_runner(folder, target)
    rows: list[tuple[int, ...] | str] = []
    for case in cases:
        try:
            inputs = runner.prepare(case.prompt, case.images)
            rows.append(tuple(runner.tokens(inputs, TOKENS, TOKENS)))
        except Exception as error:  # each runtime throws errors of its own for what its graphs cannot take
            rows.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    return rows
