"""Stage 7: prove that a configured folder (or a bundle) equals PyTorch.

In: the artifacts of each target and the checkpoint. Out: `<target>/parity.json` and `parity.txt`.
Guaranteed: inputs are compared before features, features before logits, logits before tokens, so that the first
failing gate says where a difference began; a gate that cannot be computed fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from builder import machine
from builder.cases import Case, Suite, whole_suite
from builder.checkpoint import Checkpoint, open_checkpoint
from builder.console import progress
from builder.errors import BundleError, VerificationError
from builder.estimate import verify_mode
from builder.files import write_text
from builder.gates import FP32, Gate, Report, attempted, close, exact
from builder.graphs import Graphs, merged
from builder.json_file import read_json
from builder.reference import Prompt, Reference
from builder.verify_sliced import verify_sliced
from builder.verify_tokens import Player, Ties, open_player, token_gates

if TYPE_CHECKING:
    from builder.stage import Build

STORE = "reference"
RUNNING = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "tokenizers", "pillow", "numpy")


def run(build: Build, out: Path) -> Mapping[str, object]:
    """Verifies every target; the report of one that fails stays in the stage's `.part` folder for reading."""
    facts: dict[str, object] = {}
    compared = comparison(build.checkpoint, build.memory, build.output / STORE)
    tables = []
    for target in build.recipe.targets:
        report = compared(build.folder("configure") / target.runtime, target.runtime)
        write_report(report, out / target.runtime)
        if not report.ok:
            raise failed(report, out / target.runtime)
        facts[target.runtime] = {"verdict": report.verdict, "gates": len(report.gates), **report.facts}
        tables.append(report.table())
    return {**facts, "report": "\n\n".join(tables)}


def comparison(checkpoint: Checkpoint, limit: int | None, store: Path) -> Callable[[Path, str], Report]:
    """(folder, target) → its report: whole where PyTorch and ONNX Runtime fit in memory together, else sliced.

    Args:
        limit: bytes of memory that may be used; None for all that this process may have.
        store: where a sliced comparison keeps the reference's outputs.
    """
    memory = machine.memory_limit() if limit is None else limit
    if verify_mode(checkpoint, memory) == "whole":
        whole = Reference(checkpoint)
        return lambda folder, target: verify(folder, target, whole)
    streamed = Reference(checkpoint, streamed=True)
    return lambda folder, target: verify_sliced(folder, target, streamed, memory, store)


def verify_bundle(bundle: Path, reference: Path, limit: int | None = None, store: Path | None = None) -> Report:
    """Compares a finished bundle with a checkpoint folder and writes the report into its `evidence/`.

    Args:
        limit: see `comparison`.
        store: where the reference's outputs are kept for the next time; None keeps nothing.

    Raises:
        BundleError: the folder is no bundle.
    """
    if store is None:
        with TemporaryDirectory() as passing:
            return verify_bundle(bundle, reference, limit, Path(passing))
    manifest = bundle / "manifest.json"
    if not manifest.is_file():
        raise BundleError(
            f"{bundle} is not a bundle", expected="manifest.json in it", next="python -m builder build prints the path"
        )
    target = str(read_json(manifest).get("target"))
    report = comparison(open_checkpoint(reference), limit, store)(bundle, target)
    write_report(report, bundle / "evidence")
    return report


def write_report(report: Report, folder: Path) -> None:
    """parity.json for machines, parity.txt for people."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "parity.json", json.dumps(report.as_dict(), indent=1, ensure_ascii=False) + "\n")
    write_text(folder / "parity.txt", report.table() + "\n")


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


def verify(folder: Path, target: str, reference: Reference, suite: Suite | None = None) -> Report:
    """All gates of one folder.

    Args:
        suite: what to ask; the whole suite if None.

    Raises:
        BundleError: a graph or a setting that its runtime cannot open.
    """
    checkpoint = reference.checkpoint
    if suite is None:
        with TemporaryDirectory() as drawn:
            return verify(folder, target, reference, whole_suite(checkpoint, Path(drawn)))
    graphs = Graphs.load(folder, target == "genai", checkpoint.text.hidden)
    player = open_player(folder, target)
    gates: list[Gate] = []
    ties: list[Ties] = []
    facts: dict[str, object] = {"versions": {name: version(name) for name in RUNNING}}
    with progress(f"verify {target}", len(suite.cases) + len(suite.tasks) + 1) as advance:
        gates += attempted("image features", "grids", geometry_gates, graphs, reference)
        gates += attempted("decoder prefill", "batch of two", batch_gates, graphs, reference)
        advance()
        for case in suite.cases:
            prompt = reference.prepare(case.prompt, case.images)
            gates += attempted("token ids", case.name, input_gates, case, prompt, player)
            computed, logit_error = graph_gates(case.name, graphs, reference, prompt)
            played, near = token_gates(case, prompt, player, reference, logit_error, suite.tokens)
            gates += computed + played
            ties.append(near)
            advance()
        found = tuple(one for near in ties for one in near.found)
        gates.append(Ties(sum(near.compared for near in ties), found).gate(allowed=not suite.tasks))
        if suite.tasks:
            gates += attempted("task", "held-out answers", task_gates, suite.tasks, player, reference, facts, advance)
    return Report(target, checkpoint.name, tuple(gates), facts)


def input_gates(case: Case, prompt: Prompt, player: Player) -> list[Gate]:
    """Our own preprocessing against upstream's: token ids, pixel values, positions, all bit for bit."""
    inputs = player.prepare(case.prompt, case.images)
    gates = [exact("token ids", case.name, inputs.input_ids, prompt.input_ids)]
    if prompt.pixel_values is not None:
        assert inputs.pixel_values is not None
        gates.append(exact("pixel values", case.name, inputs.pixel_values, prompt.pixel_values))
    return [*gates, exact("position ids", case.name, inputs.position_ids, prompt.position_ids)]


def graph_gates(name: str, graphs: Graphs, reference: Reference, prompt: Prompt) -> tuple[list[Gate], float]:
    """Each graph on the reference's own inputs, so that an error of one is not one of the next.

    Returns the gates, and the largest absolute difference of a logit, which no more than `FP32` allows: what is wrong
    beyond that may not excuse a token.
    """
    gates: list[Gate] = []
    hidden = reference.checkpoint.text.hidden
    main = np.zeros((0, hidden), np.float32)
    levels = [main] * len(reference.checkpoint.vision.deepstack)
    if prompt.pixel_values is not None and prompt.image_grid_thw is not None:
        main, levels = reference.vision(prompt.pixel_values, prompt.image_grid_thw)
        inputs = (prompt.pixel_values, prompt.image_grid_thw)
        gates += attempted("image features", name, feature_gates, name, graphs, *inputs, main, levels)
    mask = prompt.input_ids == reference.image_token_id
    want = merged(reference.embed(prompt.input_ids), mask, main, levels)
    arguments = (prompt.input_ids, main, levels, reference.image_token_id)
    gates += attempted("embeddings", name, embedding_gates, name, graphs, arguments, want)
    logits = reference.logits(prompt, ())[None]
    decoded = attempted("decoder prefill", name, decoder_gates, name, graphs, prompt, want, logits)
    return gates + decoded, min(max(gate.measured for gate in decoded), FP32) * float(logits.std())


def embedding_gates(
    name: str,
    graphs: Graphs,
    arguments: tuple[np.ndarray, np.ndarray, list[np.ndarray], int],
    want: tuple[np.ndarray, list[np.ndarray]],
) -> list[Gate]:
    """The merged embeddings and each DeepStack input, from `Graphs.embed(*arguments)`."""
    got = graphs.embed(*arguments)
    return [
        close("embeddings", f"{name}, {f'level {level - 1}' if level else 'main'}", a, b, FP32)
        for level, (a, b) in enumerate(zip((got[0], *got[1]), (want[0], *want[1]), strict=True))
    ]


def feature_gates(
    name: str, graphs: Graphs, pixels: np.ndarray, grid: np.ndarray, main: np.ndarray, levels: Sequence[np.ndarray]
) -> list[Gate]:
    """The vision encoder's main features and each DeepStack level."""
    got, got_levels = graphs.vision(pixels, grid)
    gates = [close("image features", name, got, main, FP32)]
    if len(got_levels) != len(levels):
        detail = f"{len(got_levels)} levels, expected {len(levels)}"
        return [*gates, Gate("deepstack features", name, float(len(levels)), 0.0, detail)]
    return gates + [
        close("deepstack features", f"{name}, level {level}", a, b, FP32)
        for level, (a, b) in enumerate(zip(got_levels, levels, strict=True))
    ]


def decoder_gates(
    name: str, graphs: Graphs, prompt: Prompt, inputs: tuple[np.ndarray, list[np.ndarray]], want: np.ndarray
) -> list[Gate]:
    """Prefill of all but six tokens, a chunk of four on that past, then two single steps, against one forward pass."""
    embeds, levels = inputs
    seq = embeds.shape[1]
    cuts = [0, seq - 6, seq - 2, seq - 1, seq]
    places = ("decoder prefill", "decoder chunk", "decoder step", "decoder step")
    gates, past = [], None
    for place, begin, end in zip(places, cuts, cuts[1:], strict=False):
        part = slice(begin, end)
        mask = np.ones((1, end), np.int64)
        pieces = [level[:, part] for level in levels]
        got, past = graphs.decode(embeds[:, part], pieces, prompt.position_ids[:, :, part], mask, past)
        expected = want[:, end - 1 : end] if graphs.packed else want[:, part]
        gates.append(close(place, f"{name}, tokens {begin}–{end}", got, expected, FP32))
    return gates


def geometry_gates(graphs: Graphs, reference: Reference) -> list[Gate]:
    """Vision only: several frames, several images of different sizes in one call, one row of blocks."""
    vision, gates = reference.checkpoint.vision, []
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    for grids in ([[2, 4, 6], [1, 2, 2]], [[1, 2, 12]], [[3, 2, 2], [1, 4, 4], [2, 8, 2]]):
        grid = np.array(grids, np.int64) * [1, vision.merge_size, vision.merge_size]
        pixels = np.random.default_rng(len(grids)).standard_normal((int(grid.prod(1).sum()), width), np.float32)
        name = " ".join("×".join(map(str, one)) for one in grid.tolist())
        gates += feature_gates(f"grid {name}", graphs, pixels, grid, *reference.vision(pixels, grid))
    return gates


def batch_gates(graphs: Graphs, reference: Reference) -> list[Gate]:
    """Two rows of equal length with different positions on the three axes, prefill and one step."""
    text = reference.checkpoint.text
    ids = np.random.default_rng(0).integers(0, text.vocab, (2, 9), np.int64)
    embeds = reference.embed(ids)
    positions = np.stack([np.arange(9)[None] * [[1], [2]] + axis * np.arange(9) for axis in range(3)]).astype(np.int64)
    want = reference.text_logits(embeds, positions)
    levels = [np.zeros_like(embeds)] * len(reference.checkpoint.vision.deepstack)
    gates, past = [], None
    for place, begin, end in (("decoder prefill", 0, 8), ("decoder step", 8, 9)):
        part = slice(begin, end)
        pieces = [level[:, part] for level in levels]
        mask = np.ones((2, end), np.int64)
        got, past = graphs.decode(embeds[:, part], pieces, positions[:, :, part], mask, past)
        expected = want[:, end - 1 : end] if graphs.packed else want[:, part]
        gates.append(close(place, "batch of two", got, expected, FP32))
    return gates


def task_gates(
    cases: Sequence[Case], player: Player, reference: Reference, facts: dict[str, object], advance: Callable[[], None]
) -> list[Gate]:
    """The text of every held-out answer, right or wrong, must be PyTorch's."""
    different, score = [], {"PyTorch": 0, "ONNX": 0}
    for case in cases:
        want = reference.text(reference.generate(reference.prepare(case.prompt, case.images), 16).tokens)
        got = player.text(tuple(player.tokens(player.prepare(case.prompt, case.images), 16)))
        score["PyTorch"] += want == case.answer
        score["ONNX"] += got == case.answer
        if got != want:
            different.append(f"{case.name} {case.prompt!r}: {got!r}, PyTorch {want!r}")
        advance()
    facts["task"] = {key: f"{value}/{len(cases)}" for key, value in score.items()}
    name = f"{len(cases)} held-out answers, right: PyTorch {score['PyTorch']}, ONNX {score['ONNX']}"
    return [Gate("task", name, float(len(different)), 0.0, "; ".join(different[:3]))]
