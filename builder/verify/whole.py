"""Stage 7: prove that a configured folder (or a bundle) equals PyTorch.

In: the artifacts of each target and the checkpoint. Out: the report in `<target>/`, in all its forms (builder/report).
Guaranteed: inputs are compared before features, features before logits, logits before tokens, so that the first
failing gate says where a difference began; a gate that cannot be computed fails.
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
from builder.verify.tokens import NearTies, counted, input_gates, takes, token_gates
from builder.verify.tolerances import limit

STORE = "reference"
RUNNING = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "tokenizers", "pillow", "numpy")


def comparison(
    checkpoint: Checkpoint, memory: int | None, store: Path, more: Sequence[Path] = (), terms: LossLimits | None = None
) -> Callable[[Path, str], Report]:
    """(folder, target) → its report: whole where PyTorch and ONNX Runtime fit in memory together, else sliced.

    Args:
        memory: bytes that may be used; None for all that this process may have.
        store: where a sliced comparison keeps the reference's outputs.
        more: files of cases besides the shipped ones, or folders of them.
        terms: what a bundle that is not exact may lose; None for one that is.
    """
    available = machine.memory_limit() if memory is None else memory
    whole = verify_mode(checkpoint, available) == "whole"
    reference = Reference(checkpoint, streamed=not whole)

    def exact(folder: Path, target: str, wanted: Reference, suite: Suite, kept: Path) -> Report:
        if whole:
            return verify(folder, target, wanted, suite)
        return verify_layerwise(folder, target, wanted, available, kept, suite.cases)

    def compared(folder: Path, target: str) -> Report:
        if terms is None and not more:
            if whole:
                return verify(folder, target, reference)
            return verify_layerwise(folder, target, reference, available, store)
        with TemporaryDirectory() as drawn:
            suite = whole_suite(checkpoint, Path(drawn), more)
            suite = suite if whole else replace(suite, cases=for_slices(suite))
            if terms is None:
                return exact(folder, target, reference, suite, store)

            def twin(twins: Path, dequantized: Checkpoint, asked: Suite) -> Report:
                return exact(twins, target, Reference(dequantized, streamed=not whole), asked, twins.parent / STORE)

            return verify_lossy(folder, target, reference, terms, suite, twin, store.parent)

    return compared


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
        store: where the reference's outputs are kept for the next time; None keeps nothing.
        more: files of cases besides the shipped ones, or folders of them.

    Raises:
        BundleError: the folder is no bundle.
    """
    if store is None:
        with TemporaryDirectory() as passing:
            return verify_bundle(bundle, reference, memory, Path(passing), more)
    target, evidence = check_bundle(bundle), own_evidence(bundle)
    check_target(bundle, target)
    terms = LossLimits.of(read_json(bundle / MANIFEST).get("recipe", {}))
    report = comparison(reference, memory, store, more, terms)(bundle, target)
    write(report, evidence, of_bundle(bundle))
    return report


def failed(report: Report, folder: Path) -> VerificationError:
    """The error that says where the first difference is."""
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
    """All gates of one folder.

    Args:
        suite: what to ask; the whole suite if None.
        fail_fast: stop behind the first comparison with a gate that fails.

    Raises:
        BundleError: a graph or a setting that its runtime cannot open.
    """
    checkpoint = reference.checkpoint
    if suite is None:
        with TemporaryDirectory() as drawn:
            whole = whole_suite(checkpoint, Path(drawn))
            return verify(folder, target, reference, whole, fail_fast=fail_fast)
    gates: list[Gate] = []
    versions = {name: version(name) for name in RUNNING} | dict(RUNTIMES[target].versions())
    facts: dict[str, object] = {"versions": versions}
    total = 2 * len(suite.cases) + len(suite.tasks) + 1
    with progress(f"verify {target}", total) as advance, collecting(checkpoint.vision) as exhibits:
        for compared in _compared(folder, target, reference, suite, facts, advance):
            gates += compared
            if fail_fast and not all(gate.ok for gate in compared):
                break
    return Report(target, checkpoint.name, tuple(gates), facts, unplayed(target, bool(suite.tasks)), exhibits())


def _compared(
    folder: Path,
    target: str,
    reference: Reference,
    suite: Suite,
    facts: dict[str, object],
    advance: Callable[[], None],
) -> Iterator[list[Gate]]:
    """The gates of each comparison: inputs of every case, layers of one, then graph by graph and case by case."""
    runner = open_runner(folder, target)
    facts |= {"not checked": unchecked(suite), "skipped": unasked(suite, runner.own)}
    asked: list[tuple[Case, Prompt]] = []
    for case in suite.cases:
        show_case(case.name, case.prompt, case.images)
        asked.append((case, reference.prepare(case.prompt, case.images, lifted=case.lifted)))
        if "inputs" in case.checks:
            yield guarded("token ids", case.name, _input_gates, *asked[-1], runner)
        advance()
    yield preprocessor_gates(folder, target, reference)
    # Before the sessions of whole graphs are there, so that no more than one slice is held beside PyTorch.
    whole = [case for case in suite.cases if not case.unchecked]
    located = next((case for case in whole if case.images), suite.cases[0])
    for case, prompt in asked:
        if case == located:
            yield from layer_gates(folder, target, reference, case.name, prompt, limit(case))
    graphs = Graphs.load(folder, GRAPHS[target].packed, reference.checkpoint.text.hidden)
    yield guarded("image features", "grids", geometry_gates, graphs, reference)
    yield guarded("decoder prefill", "batch of two", batch_gates, graphs, reference)
    advance()
    answered: list[tuple[list[Gate], NearTies]] = []
    for case, prompt in asked:
        show_case(case.name, case.prompt, case.images)
        computed, logit_error = graph_gates(case.name, graphs, reference, prompt, case.checks, limit(case))
        yield computed
        if case != located and not all(gate.ok for gate in computed):
            yield from layer_gates(folder, target, reference, case.name, prompt, limit(case))
        played, near = token_gates(case, prompt, runner, reference, logit_error, suite.tokens)
        yield played
        answered.append((played, near))
        advance()
    if runner.not_run is not None:
        return
    facts["tokens"] = counted(answered)
    found = tuple(one for _, near in answered for one in near.found)
    yield [NearTies(sum(near.compared for _, near in answered), found).gate(allowed=not suite.tasks)]
    if suite.tasks:
        score: dict[str, str] = {}
        work = (suite.tasks, runner, reference, advance)
        gates, score = guarded_pair("held-out accuracy", "held-out set", task_gates, score, *work)
        facts |= {"task": score} if score else {}
        yield gates


def unplayed(target: str, tasks: bool) -> dict[str, str]:
    """Place → why it was not compared, where the runtime cannot be played on this machine."""
    why = RUNTIMES[target].missing()
    return dict.fromkeys(("tokens", "held-out accuracy") if tasks else ("tokens",), why) if why else {}


def unchecked(suite: Suite) -> dict[str, list[str]]:
    """What the cases themselves leave out: case → its checks that are not made."""
    return {case.name: list(case.unchecked) for case in suite.cases if case.unchecked}


def unasked(suite: Suite, own: OwnProcessor | None) -> dict[str, str]:
    """Cases that a runtime's own processor cannot be asked, and why; ours is asked all."""
    if own is None:
        return {}
    why = f"not asked of the runtime's own processor, which takes {own.most_images} image a question"
    return {case.name: why for case in suite.cases if "runtime" in case.checks and not takes(own, case)}


def _input_gates(case: Case, prompt: Prompt, runner: Runner) -> list[Gate]:
    return input_gates(case.name, runner.prepare(case.prompt, case.images), prompt)


def task_gates(
    cases: Sequence[Case], runner: Runner, reference: Reference, advance: Callable[[], None]
) -> tuple[list[Gate], dict[str, str]]:
    """The text of every held-out answer, right or wrong, must be PyTorch's."""
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
