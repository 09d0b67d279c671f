"""Verify that a configured folder or a bundle equals PyTorch (stage 7).

Inputs are compared before features, features before logits, logits before tokens, so that the first failing gate shows
where a difference began. A gate that cannot be computed fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from builder.bundle.layout import MANIFEST, check_bundle, own_evidence
from builder.checkpoint.load import Checkpoint
from builder.reference.cases import Case, Suite, whole_suite
from builder.reference.model import Prompt, Reference
from builder.targets.graphs import GRAPHS
from builder.targets.runners.protocol import OwnProcessor, Runner
from builder.targets.runners.registry import RUNTIMES, check_target, open_runner
from builder.util import machine
from builder.util.errors import VerificationError
from builder.util.json_files import read_json
from builder.util.progress import progress
from builder.verify.graphs.per_graph import batch_gates, geometry_gates, graph_gates, layer_gates
from builder.verify.graphs.sessions import Graphs
from builder.verify.image_preprocessor import preprocessor_gates
from builder.verify.layerwise import for_slices, verify_layerwise
from builder.verify.memory_budget import verify_mode
from builder.verify.quantized import LossLimits, verify_lossy
from builder.verify.report.context import of_bundle
from builder.verify.report.exhibits import collecting, show_answers, show_case
from builder.verify.report.gates import Gate, Report, guarded, guarded_pair
from builder.verify.report.write import write
from builder.verify.tokens import NearTies, count_equal_tokens, input_gates, takes, token_gates
from builder.verify.tolerances import limit

STORE = "reference"
RUNNING = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "tokenizers", "pillow", "numpy")


def comparison(
    checkpoint: Checkpoint, memory: int | None, store: Path, more: Sequence[Path] = (), terms: LossLimits | None = None
) -> Callable[[Path, str], Report]:
    """Return (folder, target) → report: with complete models if both fit in memory, else layer by layer.

    Args:
        memory: bytes that may be used; None for the limit of this process.
        store: folder where a layerwise comparison caches the reference's outputs.
        more: additional case files, or folders of them.
        terms: limits of a lossy bundle; None for an exact bundle.
    """
    available = machine.memory_limit() if memory is None else memory
    whole = verify_mode(checkpoint, available) == "whole"
    reference = Reference(checkpoint, streamed=not whole)

    def exact(folder: Path, target: str, expected: Reference, suite: Suite, cache: Path) -> Report:
        if whole:
            return verify(folder, target, expected, suite)
        return verify_layerwise(folder, target, expected, available, cache, suite.cases)

    def compare(folder: Path, target: str) -> Report:
        if terms is None and not more:
            if whole:
                return verify(folder, target, reference)
            return verify_layerwise(folder, target, reference, available, store)
        with TemporaryDirectory() as images:
            suite = whole_suite(checkpoint, Path(images), more)
            suite = suite if whole else replace(suite, cases=for_slices(suite))
            if terms is None:
                return exact(folder, target, reference, suite, store)

            def verify_copy(copy: Path, dequantized: Checkpoint, suite: Suite) -> Report:
                return exact(copy, target, Reference(dequantized, streamed=not whole), suite, copy.parent / STORE)

            return verify_lossy(folder, target, reference, terms, suite, verify_copy, store.parent)

    return compare


def verify_bundle(
    bundle: Path,
    reference: Checkpoint,
    memory: int | None = None,
    store: Path | None = None,
    more: Sequence[Path] = (),
) -> Report:
    """Compare a finished bundle with a checkpoint, and write the report into its `evidence/`.

    Args:
        memory: see `comparison`.
        store: folder that caches the reference's outputs; None for no cache.
        more: additional case files, or folders of them.

    Raises:
        BundleError: the folder is not a bundle.
    """
    if store is None:
        with TemporaryDirectory() as temporary:
            return verify_bundle(bundle, reference, memory, Path(temporary), more)
    target, evidence = check_bundle(bundle), own_evidence(bundle)
    check_target(bundle, target)
    terms = LossLimits.of(read_json(bundle / MANIFEST).get("recipe", {}))
    report = comparison(reference, memory, store, more, terms)(bundle, target)
    write(report, evidence, of_bundle(bundle))
    return report


def failed(report: Report, folder: Path) -> VerificationError:
    """Return the error for a report that failed."""
    first = report.first_failure
    what = "no gate was computed" if first is None else f"first difference: {first.place}, {first.case}"
    return VerificationError(
        f"{report.target} does not equal PyTorch; {what}",
        expected=None if first is None else f"at most {first.limit:g}",
        found=None if first is None else first.detail or f"{first.measured:g}",
        next=f"read {folder / 'parity.txt'}",
    )


def verify(
    folder: Path, target: str, reference: Reference, suite: Suite | None = None, *, fail_fast: bool = False
) -> Report:
    """Compute all gates of a configured folder or a bundle.

    Args:
        suite: cases to compare; the complete suite if None.
        fail_fast: stop after the first comparison with a failing gate.

    Raises:
        BundleError: the runtime cannot open a graph or a settings file.
    """
    checkpoint = reference.checkpoint
    if suite is None:
        with TemporaryDirectory() as images:
            suite = whole_suite(checkpoint, Path(images))
            return verify(folder, target, reference, suite, fail_fast=fail_fast)
    gates: list[Gate] = []
    versions = {name: version(name) for name in RUNNING} | dict(RUNTIMES[target].versions())
    facts: dict[str, object] = {"versions": versions}
    total = 2 * len(suite.cases) + len(suite.tasks) + 1
    with progress(f"verify {target}", total) as advance, collecting(checkpoint.vision) as exhibits:
        for compared in _comparisons(folder, target, reference, suite, facts, advance):
            gates += compared
            if fail_fast and not all(gate.ok for gate in compared):
                break
    return Report(target, checkpoint.name, tuple(gates), facts, runtime_not_run(target, bool(suite.tasks)), exhibits())


def _comparisons(
    folder: Path,
    target: str,
    reference: Reference,
    suite: Suite,
    facts: dict[str, object],
    advance: Callable[[], None],
) -> Iterator[list[Gate]]:
    """Yield the gates of each comparison: inputs of every case, layers of one, then graphs and tokens of every case."""
    runner = open_runner(folder, target)
    facts |= {"not checked": unchecked(suite), "skipped": skipped(suite, runner.own)}
    prompts: list[tuple[Case, Prompt]] = []
    for case in suite.cases:
        show_case(case.name, case.prompt, case.images)
        prompts.append((case, reference.prepare(case.prompt, case.images, lifted=case.lifted)))
        if "inputs" in case.checks:
            yield guarded("token ids", case.name, _input_gates, *prompts[-1], runner)
        advance()
    yield preprocessor_gates(folder, target, reference)
    # Before the complete graphs are loaded, so that memory holds at most one slice in addition to PyTorch.
    fully_checked = [case for case in suite.cases if not case.unchecked]
    located = next((case for case in fully_checked if case.images), suite.cases[0])
    for case, prompt in prompts:
        if case == located:
            yield from layer_gates(folder, target, reference, case.name, prompt, limit(case))
    graphs = Graphs.load(folder, GRAPHS[target].packed, reference.checkpoint.text.hidden)
    yield guarded("image features", "grids", geometry_gates, graphs, reference)
    yield guarded("decoder prefill", "batch of two", batch_gates, graphs, reference)
    advance()
    results: list[tuple[list[Gate], NearTies]] = []
    for case, prompt in prompts:
        show_case(case.name, case.prompt, case.images)
        computed, logit_error = graph_gates(case.name, graphs, reference, prompt, case.checks, limit(case))
        yield computed
        if case != located and not all(gate.ok for gate in computed):
            yield from layer_gates(folder, target, reference, case.name, prompt, limit(case))
        compared, ties = token_gates(case, prompt, runner, reference, logit_error, suite.tokens)
        yield compared
        results.append((compared, ties))
        advance()
    if runner.not_run is not None:
        return
    facts["tokens"] = count_equal_tokens(results)
    found = tuple(tie for _, ties in results for tie in ties.found)
    yield [NearTies(sum(ties.compared for _, ties in results), found).gate(allowed=not suite.tasks)]
    if suite.tasks:
        score: dict[str, str] = {}
        work = (suite.tasks, runner, reference, advance)
        gates, score = guarded_pair("held-out accuracy", "held-out set", task_gates, score, *work)
        facts |= {"task": score} if score else {}
        yield gates


def runtime_not_run(target: str, tasks: bool) -> dict[str, str]:
    """Return place → why it is not compared, if the runtime cannot run on this machine."""
    why = RUNTIMES[target].missing()
    return dict.fromkeys(("tokens", "held-out accuracy") if tasks else ("tokens",), why) if why else {}


def unchecked(suite: Suite) -> dict[str, list[str]]:
    """Return case → the checks that its file leaves out."""
    return {case.name: list(case.unchecked) for case in suite.cases if case.unchecked}


def skipped(suite: Suite, own: OwnProcessor | None) -> dict[str, str]:
    """Return case → why it is not run through the runtime's own processor."""
    if own is None:
        return {}
    why = f"not run through the runtime's own processor, which takes {own.most_images} image per prompt"
    return {case.name: why for case in suite.cases if "runtime" in case.checks and not takes(own, case)}


def _input_gates(case: Case, prompt: Prompt, runner: Runner) -> list[Gate]:
    return input_gates(case.name, runner.prepare(case.prompt, case.images), prompt)


def task_gates(
    cases: Sequence[Case], runner: Runner, reference: Reference, advance: Callable[[], None]
) -> tuple[list[Gate], dict[str, str]]:
    """Compare the text of every held-out answer, correct or not, with PyTorch's."""
    different, score = [], {"PyTorch": 0, "ONNX": 0}
    for case in cases:
        show_case(case.name, case.prompt, case.images, kind="task", expected=case.answer)
        want = reference.text(reference.generate(reference.prepare(case.prompt, case.images), 16).tokens)
        got = runner.text(tuple(runner.tokens(runner.prepare(case.prompt, case.images), 16)))
        show_answers(got, want)
        score["PyTorch"] += want == case.answer
        score["ONNX"] += got == case.answer
        if got != want:
            different.append(f"{case.name} {case.prompt!r}: {got!r}, PyTorch {want!r}")
        advance()
    facts = {key: f"{value}/{len(cases)}" for key, value in score.items()}
    name = f"{len(cases)} held-out answers, right: PyTorch {score['PyTorch']}, ONNX {score['ONNX']}"
    return [Gate("held-out accuracy", name, float(len(different)), 0.0, "; ".join(different[:3]))], facts
