"""Prove that a bundle equals PyTorch, without PyTorch: against a golden.

Neither torch nor transformers is imported. A golden of another checkpoint, of other cases or images, or of another
format is refused; an image that this machine's decoder reads differently is reported as that, and what depends on it
as not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from builder.bundle.format1 import OLD_CASES
from builder.bundle.layout import check_bundle, own_evidence
from builder.checkpoint.load import Checkpoint
from builder.reference.cases import SUITE, Case, held_out, placed, read_cases
from builder.reference.model import ANY_SIZE, Answer
from builder.reference.synthetic_images import SizeLimits
from builder.targets.clients.pipeline import Inputs, encode, load_image, position_ids, preprocess
from builder.targets.graphs import GRAPHS
from builder.targets.runners.protocol import OwnProcessor, Runner
from builder.targets.runners.registry import RUNTIMES, open_runner
from builder.util.errors import GoldenError, VerificationError
from builder.util.json_files import read_json
from builder.util.progress import progress
from builder.util.versions import version
from builder.verify.golden.file import Golden, GoldenCase, floats, read_golden
from builder.verify.golden.graphs import graph_gates
from builder.verify.golden.record import (
    MADE_WITH,
    TASK_TOKENS,
    case_digest,
    digest,
    image_digests,
    made_from,
    pixel_digests,
    task_digest,
)
from builder.verify.graphs.sessions import Graphs
from builder.verify.image_preprocessor import golden_preprocessor_gates
from builder.verify.report.context import of_bundle
from builder.verify.report.gates import Gate, Report, compare_exact, guarded, guarded_pair
from builder.verify.report.write import write
from builder.verify.tokens import NearTies, answer_from, compare
from builder.verify.tolerances import limit
from builder.verify.whole import failed as verify_failed
from builder.verify.whole import unplayed

RUNNING = ("onnxruntime", "onnxruntime-genai", "tokenizers", "pillow", "numpy")
PART = "golden"  # of a bundle's evidence/
REMAKE = "qwen3vl-onnx golden CHECKPOINT --output {}"


def verify_golden(bundle: Path, path: Path, more: Sequence[Path] = (), checkpoint: Checkpoint | None = None) -> Report:
    """All gates of a bundle that a golden has figures for.

    Args:
        path: of the golden.
        more: the cases files (or folders) that it was made with besides the shipped ones.
        checkpoint: its held-out set is next to it; None leaves that out, and says so.

    Raises:
        GoldenError: see the module.
        BundleError: no bundle, or a graph or a setting that its runtime cannot open.
        CasesError: see `builder.reference.cases.read_cases`.
    """
    golden, target = read_golden(path), check_bundle(bundle)
    _check_made_from(golden, path, bundle, checkpoint)
    runner = open_runner(bundle, target)
    with TemporaryDirectory() as drawn:
        cases = placed(read_cases((SUITE, *more)), SizeLimits(*golden.limits), Path(drawn))
        _check_cases(golden, path, cases)
        graphs = Graphs.load(bundle, GRAPHS[target].packed, golden.hidden, layer_outputs=True)
        report = _report(target, golden, cases, runner, graphs, checkpoint)
    return replace(report, gates=(*report.gates, *golden_preprocessor_gates(bundle, target, runner.vision)))


def verify_bundle_golden(
    bundle: Path, path: Path, more: Sequence[Path] = (), checkpoint: Checkpoint | None = None
) -> Report:
    """`verify_golden`, and its report in `evidence/golden/`: the one of the comparison with PyTorch stays."""
    evidence = own_evidence(bundle, PART)
    report = verify_golden(bundle, path, more, checkpoint)
    write(report, evidence, of_bundle(bundle))
    return report


def failed(report: Report, folder: Path) -> VerificationError:
    """The error that says where the first difference is, and whether it is the bundle's or this machine's decoder's."""
    failing = [gate for gate in report.gates if not gate.ok]
    decoded = [gate for gate in failing if gate.place == "decoded image"]
    if not decoded or len(decoded) < len(failing):
        others = replace(report, gates=tuple(gate for gate in report.gates if gate not in decoded))
        return verify_failed(others, folder)
    first = decoded[0]
    return VerificationError(
        f"an image is decoded in another way than where the golden was made; {report.target} is not to blame: "
        f"{first.case}",
        expected="the same RGB from the same file",
        found=first.detail,
        next=f"make the golden with this Pillow, or use the other one; read {folder / 'parity.txt'}",
    )


def _report(
    target: str, golden: Golden, cases: Sequence[Case], runner: Runner, graphs: Graphs, checkpoint: Checkpoint | None
) -> Report:
    gates: list[Gate] = []
    ties: list[NearTies] = []
    not_run = unplayed(target, golden.task is not None)
    wanted = {case.name: case for case in golden.cases}
    tasks = held_out(checkpoint) if checkpoint else ()
    with progress(f"verify {target} by a golden", len(cases) + len(tasks)) as advance:
        for case in cases:
            compared, near, why = case_gates(case, wanted[case.name], golden, runner, graphs)
            gates += compared
            ties.append(near)
            not_run |= {f"case {case.name}": why} if why else {}
            advance()
        found = tuple(one for near in ties for one in near.found)
        if runner.not_run is None:
            gates.append(NearTies(sum(near.compared for near in ties), found).gate(allowed=golden.task is None))
        if golden.task is not None and tasks and runner.not_run is None:
            gates += guarded("held-out accuracy", "held-out set", _task_gates, tasks, golden, runner)
    if golden.task is not None and not tasks and runner.not_run is None:
        not_run["held-out accuracy"] = "the held-out set lies beside the checkpoint: give --reference CHECKPOINT"
    if runner.own is not None:
        not_run["tokens of the runtime's pixels"] = "needs PyTorch, fed with the runtime's pixels"
    facts = {
        "golden of": golden.versions,
        "versions": {name: version(name) for name in RUNNING} | dict(RUNTIMES[target].versions()),
        "not checked": {case.name: list(case.unchecked) for case in cases if case.unchecked},
    }
    return Report(target, golden.checkpoint.name, tuple(gates), facts, not_run)


def case_gates(
    case: Case, want: GoldenCase, golden: Golden, runner: Runner, graphs: Graphs
) -> tuple[list[Gate], NearTies, str]:
    """The gates of one case, its near ties, and why the rest of it was not run ("" where all was)."""
    gates, ties = decoded_gates(case, want, golden), NearTies(0, ())
    if not all(gate.ok for gate in gates):
        return gates, ties, "its image is decoded in another way here, so that all that follows differs"
    compared, inputs = guarded_pair("token ids", case.name, _input_gates, None, case, want, runner, golden)
    gates += compared
    if inputs is None or not all(gate.ok for gate in gates):
        return gates, ties, "its inputs differ, so that all that follows does"
    computed, logit_error = graph_gates(graphs, golden, want, inputs, limit(case))
    gates += computed
    if want.tokens and runner.not_run is None:
        compared, ties = guarded_pair("tokens", case.name, _token_gates, ties, case, want, runner, inputs, logit_error)
        gates += compared
    if runner.own is not None and case.images and "runtime" in case.checks:
        gates += guarded("runtime's pixel values", case.name, _runtime_gates, case, want, runner.own)
    return gates, ties, ""


def decoded_gates(case: Case, want: GoldenCase, golden: Golden) -> list[Gate]:
    """Whether each image's RGB is what it was where the golden was made."""
    gates = []
    here = {name: version(name) for name in ("pillow",)}
    for got, mark, path in zip(image_digests(case), want.images, case.images, strict=True):
        off = float(got.rgb != mark.rgb or got.size != mark.size)
        told = f"{path.name} is the same file, decoded by Pillow {here['pillow']}; "
        told += f"the golden's was decoded by Pillow {golden.versions.get('pillow')}"
        gates.append(Gate("decoded image", f"{case.name}, {path.name}", off, 0.0, told if off else ""))
    return gates


def _input_gates(case: Case, want: GoldenCase, runner: Runner, golden: Golden) -> tuple[list[Gate], Inputs]:
    inputs = _lifted(case, runner) if case.lifted else runner.prepare(case.prompt, case.images)
    ids = np.array([want.input_ids], np.int64)
    gates = [compare_exact("token ids", case.name, inputs.input_ids, ids)]
    if inputs.pixel_values is not None and inputs.image_grid_thw is not None:
        gates.append(_pixel_gate("pixel values", case, want, inputs, golden))
    off = float(digest(inputs.position_ids) != want.position_ids)
    told = "another digest of [3, 1, seq]" if off else ""
    return [*gates, Gate("position ids", case.name, off, 0.0, told)], inputs


def _pixel_gate(place: str, case: Case, want: GoldenCase, inputs: Inputs, golden: Golden | None = None) -> Gate:
    """The number of images whose pixel values have another digest."""
    assert inputs.pixel_values is not None
    assert inputs.image_grid_thw is not None
    grids = tuple(tuple(row) for row in inputs.image_grid_thw.tolist())
    if grids != want.grids:
        return Gate(place, case.name, float(len(want.grids)), 0.0, f"grids {grids}, expected {want.grids}")
    got = pixel_digests(inputs.pixel_values, inputs.image_grid_thw)
    differ = [path.name for path, a, b in zip(case.images, got, want.pixel_values, strict=True) if a != b]
    others = {} if golden is None else _other_versions(golden)
    told = f"other values: {', '.join(differ)}" if differ else ""
    return Gate(place, case.name, float(len(differ)), 0.0, told + (f"; {others}" if differ and others else ""))


def _other_versions(golden: Golden) -> str:
    pairs = {name: (golden.versions.get(name), version(name)) for name in MADE_WITH if name in RUNNING}
    return ", ".join(f"{name} {then} → {now}" for name, (then, now) in pairs.items() if then != now)


def _lifted(case: Case, runner: Runner) -> Inputs:
    """A case's inputs with images of any number of pixels, by the bundle's settings otherwise."""
    vision = replace(runner.vision, max_pixels=ANY_SIZE)
    pixels, grids = preprocess([load_image(path) for path in case.images], vision)
    ids = encode(case.prompt, grids, runner.tokenizer, runner.settings)
    return Inputs(ids, pixels, grids, *position_ids(ids, grids, runner.settings))


def _token_gates(
    case: Case, want: GoldenCase, runner: Runner, inputs: Inputs, logit_error: float
) -> tuple[list[Gate], NearTies]:
    answer = Answer(want.tokens, tuple(floats(want.margins).tolist()))
    play = answer_from(runner, inputs, answer)
    gate, ties = compare(f"{case.name}, {len(want.tokens)} tokens", play, answer, logit_error)
    return [gate], NearTies(len(want.tokens), tuple(ties))


def _runtime_gates(case: Case, want: GoldenCase, own: OwnProcessor) -> list[Gate]:
    """The runtime's own processor, where it sees what upstream sees: see `builder.verify.tokens.runtime_gates`."""
    if not all(own.at_target_size(path) for path in case.images):
        return []
    _, inputs = own.runtime_inputs(case.prompt, case.images)
    ids = np.array([want.input_ids], np.int64)
    return [
        _pixel_gate("runtime's pixel values", case, want, inputs),
        compare_exact("token ids", f"{case.name}, runtime's tokenizer", inputs.input_ids, ids),
    ]


def _task_gates(tasks: Sequence[Case], golden: Golden, runner: Runner) -> list[Gate]:
    assert golden.task is not None
    if task_digest(tasks) != golden.task.digest:
        raise GoldenError(
            "the golden was made with another held-out set",
            expected="the same questions and images",
            found=f"{len(tasks)} questions, with a difference",
        )
    differ, right = [], 0
    for task, want in zip(tasks, golden.task.answers, strict=True):
        got = runner.text(tuple(runner.tokens(runner.prepare(task.prompt, task.images), TASK_TOKENS)))
        right += got == task.answer
        if got != want:
            differ.append(f"{task.name} {task.prompt!r}: {got!r}, PyTorch {want!r}")
    name = f"{len(tasks)} held-out answers, right: ONNX {right}"
    return [Gate("held-out accuracy", name, float(len(differ)), 0.0, "; ".join(differ[:3]))]


def _check_made_from(golden: Golden, path: Path, bundle: Path, checkpoint: Checkpoint | None) -> None:
    made = golden.checkpoint
    said = read_json(bundle / "manifest.json").get("checkpoint")
    if isinstance(said, Mapping):
        files = {name: one.get("sha256") for name, one in said.get("files", {}).items()}
        _same(path, made.config_sha256, said.get("config_sha256"), made.files, files, f"the bundle {bundle}")
    elif checkpoint is None:
        raise GoldenError(
            f"{bundle / 'manifest.json'} does not say which checkpoint it was made from",
            expected=f"the checkpoint that {path} was made from: {made.name}",
            found=f"a manifest without it: {said!r}",
            next="give --reference CHECKPOINT as well, or build the bundle again",
        )
    if checkpoint is not None:
        given = made_from(checkpoint)
        _same(path, made.config_sha256, given.config_sha256, made.files, given.files, str(checkpoint.folder))


def _same(path: Path, config: str, other: Any, files: Mapping[str, str], others: Mapping[str, Any], what: str) -> None:
    differ = [name for name in files if name in others and others[name] != files[name]]
    if config != other or differ or not files.keys() & others.keys():
        raise GoldenError(
            f"{path} was made from another checkpoint than {what}",
            expected=f"the same {', '.join(differ) or 'config.json'}",
            found="other bytes",
            next=REMAKE.format(path),
        )


def _check_cases(golden: Golden, path: Path, cases: Sequence[Case]) -> None:
    known, asked = {case.name: case for case in golden.cases}, {case.name: case for case in cases}
    absent = sorted(known.keys() ^ asked.keys())
    if absent:
        raise GoldenError(
            f"{path} was made with other cases: {absent[0]!r} is only {'there' if absent[0] in known else 'here'}",
            expected=f"the {len(known)} cases that it was made with",
            found=f"{len(asked)} cases",
            next=f"give the same --cases as then, or make it again: {REMAKE.format(path)}",
        )
    for name, case in asked.items():
        # The digest is over the case's name: an earlier format's has another one.
        named = replace(case, name=OLD_CASES.get(case.name, case.name)) if golden.format == 1 else case
        if case_digest(named) != known[name].digest:
            raise GoldenError(
                f"{path} was made with another case {name!r}",
                expected="the same prompt, checks and images",
                found="a difference",
                next=REMAKE.format(path),
            )
