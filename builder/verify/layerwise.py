"""Verify a bundle layer by layer, where the complete model does not fit in memory.

PyTorch holds one layer at a time, and ONNX Runtime one slice of a graph in a separate process. Every node of every
graph runs, with a gate on every layer. Tokens are compared only if the bundle's weights fit in memory.
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
from builder.verify.tokens import TIE, NearTies, count_equal_tokens, input_gates
from builder.verify.tolerances import limit

TOKENS = 16
TWICE = 2  # a slice's peak over its weights: ONNX Runtime prepacks weights while it still holds the originals
RUNNING = 1.25  # a bundle's peak over its data files (2B: 9.9 GB over 8.5 GB)


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
    """Compute all gates of a configured folder or a bundle.

    Args:
        reference: streamed from the checkpoint.
        memory: bytes that a process may use.
        store: folder that caches the reference's outputs.
        cases: cases to compare; the shipped cases tagged "layerwise" if None.
        fail_fast: stop after the first place that fails.

    Raises:
        BundleError: the runtime cannot open a graph or a settings file.
    """
    chosen = layerwise(shipped_cases()) if cases is None else cases
    sizes = reference.checkpoint.vision
    with progress(f"verify {target} in slices", len(chosen) + 4) as advance, collecting(sizes) as exhibits:
        traces, gates = [], []
        for case in chosen:
            trace, compared = _trace(case, folder, reference, store)
            traces.append(trace)
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
            gates += [] if ended else guarded(place, "in slices", in_order, compute, traces)
            advance()
        not_run: dict[str, str] = {}
        if not (fail_fast and not all(gate.ok for gate in gates)):
            compared, not_run = _token_gates(folder, target, reference, chosen, traces, gates, memory)
            gates += compared
        advance()
    versions = {name: version(name) for name in ("torch", "transformers", "onnxruntime", "numpy")}
    facts: dict[str, object] = {
        "versions": versions | dict(RUNTIMES[target].versions()),
        "peak_rss": max(graphs.peak, peak_memory.peak_rss() or 0),
        "cases": [trace.name for trace in traces],
    }
    if "tokens" not in not_run:
        equal = count_equal_tokens([(gates, NearTies(TOKENS * len(traces), ()))])
        facts["tokens"] = {**equal, "cases": len(traces)}
    return Report(target, reference.checkpoint.name, tuple(gates), facts, not_run, exhibits())


def for_slices(suite: Suite) -> tuple[Case, ...]:
    """Return the cases to compare layer by layer.

    Raises:
        CasesError: a case leaves out checks, which a comparison in slices does not support.
    """
    chosen = layerwise(suite.cases)
    for case in chosen:
        if case.unchecked:
            raise CasesError(
                f"case {case.name!r} leaves out checks, but a comparison in slices always makes all of them",
                expected="no `checks` and no `limits`",
                found=f"without {', '.join(case.unchecked)}",
                next="leave that file out, or give more --memory",
            )
    return chosen


def slice_budget(memory: int) -> int:
    """Return the bytes of weights in one slice if a process may use `memory` bytes."""
    return min(SLICE, max(1, (memory - VERIFY_MEMORY) // TWICE))


def _trace(case: Case, folder: Path, reference: Reference, store: Path) -> tuple[TraceCase, list[Gate]]:
    """Trace the reference on a case, and compare the bundle's preprocessing with PyTorch's."""
    settings, vision = read_settings(folder / "pipeline.json"), read_image_settings(folder / "vision_processor.json")
    inputs = prepare(case.prompt, case.images, load_tokenizer(folder / "tokenizer.json"), settings, vision)
    prompt = reference.prepare(case.prompt, case.images)
    show_case(case.name, case.prompt, case.images)
    return ReferenceCase(case.name, prompt, traced(reference, prompt, store), limit(case)), input_gates(
        case.name, inputs, prompt
    )


def _token_gates(
    folder: Path,
    target: str,
    reference: Reference,
    cases: Sequence[Case],
    traces: Sequence[TraceCase],
    gates: Sequence[Gate],
    memory: int,
) -> tuple[list[Gate], dict[str, str]]:
    """Compare greedy tokens of the bundle's own runtime with PyTorch's, teacher-forced."""
    if why := RUNTIMES[target].missing():
        return [], {"tokens": why}
    needed = VERIFY_MEMORY + round(RUNNING * sum(file.stat().st_size for file in data_files(folder)))
    if needed > memory:
        return [], {"tokens": f"needs {size(needed)} of memory, {size(memory)} available"}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        answers = pool.submit(_generate, folder, target, list(cases)).result()
    compared: list[Gate] = []
    ties: list[str] = []
    for trace, tokens in zip(traces, answers, strict=True):
        if isinstance(tokens, str):
            compared.append(Gate("tokens", trace.name, float("inf"), 0.0, tokens))
            continue
        logits = reference.hidden_states(trace.prompt, tokens[:-1], keep=len(tokens)).logits
        error = logit_error(gates, trace.limit, float(trace.expected.logits.std()))
        name, suppressed = f"{trace.name}, {len(tokens)} tokens", eos_token_ids(reference.checkpoint)
        gate, near = teacher_forced_gate(name, tokens, logits, error, suppressed)
        compared.append(gate)
        ties += near
    return [*compared, NearTies(TOKENS * len(traces), tuple(ties)).gate(allowed=True)], {}


def teacher_forced_gate(
    name: str, tokens: Sequence[int], logits: np.ndarray, logit_error: float, suppressed: Sequence[int]
) -> tuple[Gate, list[str]]:
    """Compare each token with the reference's top-1 after the tokens before it, which equals greedy `generate()`.

    Args:
        logits: [len(tokens), vocab] of the reference, at the positions that predict the tokens.
        logit_error: a lead of the reference below `TIE` times this is a near tie.
        suppressed: stop tokens, which neither side could choose.

    Returns:
        the gate, and a description of each near tie.
    """
    ties: list[str] = []
    for position, (token, row) in enumerate(zip(tokens, logits.copy(), strict=True)):
        row[list(suppressed)] = -np.inf
        second, first = np.argsort(row)[-2:]
        if token == first:
            continue
        lead = float(row[first] - row[second])
        difference = f"{name}: token {position} is {token}, PyTorch {first} with a lead of {lead:.2e}"
        if token != second or not lead < TIE * logit_error:
            return Gate("tokens", name, float(len(tokens) - position), 0.0, difference), ties
        ties.append(difference)
    return Gate("tokens", name, 0.0, 0.0), ties


def _generate(folder: Path, target: str, cases: Sequence[Case]) -> list[tuple[int, ...] | str]:
    """Generate the tokens of each case, or the runtime's error message; runs in a separate process."""
    runner = open_runner(folder, target)
    rows: list[tuple[int, ...] | str] = []
    for case in cases:
        try:
            inputs = runner.prepare(case.prompt, case.images)
            rows.append(tuple(runner.tokens(inputs, TOKENS, TOKENS)))
        except Exception as error:  # each runtime raises its own exception types
            rows.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    return rows
