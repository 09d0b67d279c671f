"""Test layerwise verification: intact bundles pass, broken layers are named, places not run are reported."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from builder.checkpoint.load import open_checkpoint
from builder.cli.app import app
from builder.reference import trace_cache
from builder.reference.cases import shipped_cases
from builder.reference.model import Reference, Trace
from builder.verify import layerwise, whole
from builder.verify.graphs import slices
from builder.verify.layerwise import teacher_forced_gate
from builder.verify.memory_budget import verify_memory
from builder.verify.report.gates import Report
from builder.verify.self_test import mutations
from builder.verify.self_test.edits import edited
from builder.verify.self_test.mutants import Mutation
from tests.helpers.checkpoints import MINIATURE
from tests.helpers.shown import shown

pytestmark = pytest.mark.torch

ONE = tuple(case for case in shipped_cases() if case.name == "one image")
PLENTY = 10**10


@pytest.fixture(scope="module")
def streamed() -> Reference:
    return Reference(open_checkpoint(MINIATURE), streamed=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One per module, so that the reference is computed once."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run slices in this process: starting a process takes longer than the miniature."""
    monkeypatch.setattr(slices, "_in_process", slices.compute)


def report(folder: Path, reference: Reference, store: Path, limit: int = 10**6) -> Report:
    return layerwise.verify_layerwise(folder, folder.name, reference, limit, store, ONE)


@pytest.mark.parametrize("target", ["genai", "onnxruntime"])
def test_an_intact_bundle_passes_with_its_tokens(
    miniature_built: Path, streamed: Reference, store: Path, target: str
) -> None:
    """Slices and the bundle's runtime run in separate processes, as in the command."""
    found = report(miniature_built / target, streamed, store, PLENTY)
    assert found.ok, shown(found)
    assert (found.verdict, found.not_run) == ("passed", {})
    places = {gate.place: sum(other.place == gate.place for other in found.gates) for gate in found.gates}
    assert places["decoder layers"] == 4 * streamed.checkpoint.text.layers
    assert places["vision layers"] == streamed.checkpoint.vision.depth
    assert places["deepstack features"] == 3
    assert places["tokens"] == 2  # the case, and the number of near ties
    assert found.facts["peak_rss"] > 10**8


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("target", ["genai", "onnxruntime"])
def test_tokens_are_not_run_if_the_weights_do_not_fit(
    miniature_built: Path, streamed: Reference, store: Path, target: str
) -> None:
    found = report(miniature_built / target, streamed, store)
    assert found.ok, shown(found)
    assert found.verdict == "partial"
    assert found.not_run == {"tokens": "needs 1.0 GB of memory, 1 MB available"}
    assert "not run: needs 1.0 GB" in shown(found)
    document = found.as_dict()
    assert (document["verdict"], document["not run"]) == ("partial", found.not_run)


CONTROLS: tuple[tuple[Mutation, str, str, str], ...] = (
    (mutations.mlp_scaled, "genai", "decoder layers", "layer 3"),
    (mutations.mlp_scaled, "onnxruntime", "decoder layers", "layer 3"),
    (mutations.layers_swapped, "genai", "decoder layers", "layer 1"),
    (mutations.layers_swapped, "onnxruntime", "decoder layers", "layer 1"),
    (mutations.rotary_axes_swapped, "genai", "decoder layers", "layer 0"),
    (mutations.attention_mask_off_by_one, "onnxruntime", "decoder layers", "layer 0"),
    (mutations.deepstack_zeroed, "genai", "deepstack features", "one image, level 0"),
    (mutations.image_features_shifted, "genai", "embeddings", "one image, main"),
    (mutations.newline_lost, "genai", "token ids", "one image"),
    (mutations.mean_changed, "onnxruntime", "pixel values", "one image"),
)


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("mutation", "target", "place", "where"),
    CONTROLS,
    ids=[f"{change.__name__}-{target}" for change, target, *_ in CONTROLS],
)
def test_the_broken_place_is_named(
    bundle: Callable[[str], Path],
    streamed: Reference,
    store: Path,
    mutation: Mutation,
    target: str,
    place: str,
    where: str,
) -> None:
    broken = bundle(target)
    mutation(broken, target)
    found = report(broken, streamed, store)
    assert found.verdict == "failed"
    assert found.first_failure is not None
    assert found.first_failure.place == place, shown(found)
    assert found.first_failure.case.endswith(where), shown(found)


@pytest.mark.usefixtures("_here")
def test_a_graph_without_a_residual_output_fails(
    bundle: Callable[[str], Path], streamed: Reference, store: Path
) -> None:
    """A layer whose residual stream has another name is not skipped silently."""
    folder = bundle("genai")
    with edited(folder, "model") as graph:
        (stream,) = [v for node in graph for v in node.outputs if v.name == "residual.2"]
        stream.name = "stream_2"
    found = report(folder, streamed, store)
    failing = [gate for gate in found.gates if not gate.ok]
    assert {gate.case.rpartition(", ")[2] for gate in failing} == {"layer 2"}
    assert all(math.isinf(gate.measured) and "no residual.2" in gate.detail for gate in failing)


def test_the_reference_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Reference(open_checkpoint(MINIATURE), streamed=True)
    text = reference.prepare("Repeat: seven.", ())
    other = reference.prepare("Repeat: eight.", ())
    calls: list[int] = []
    computed = Reference.hidden_states

    def counting(self: Reference, *arguments: object) -> Trace:
        calls.append(1)
        return computed(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Reference, "hidden_states", counting)
    first = trace_cache.traced(reference, text, tmp_path)
    again = trace_cache.traced(reference, text, tmp_path)
    assert len(calls) == 1
    for a, b in zip((*first.decoder, first.logits), (*again.decoder, again.logits), strict=True):
        np.testing.assert_array_equal(a, b)
    trace_cache.traced(reference, other, tmp_path)
    trace_cache.traced(reference, text, tmp_path, (5,))
    assert len(calls) == 3
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    np.testing.assert_array_equal(trace_cache.traced(reference, text, tmp_path).logits, first.logits)
    assert len(calls) == 4
    assert not list(tmp_path.glob("*.part"))


LOGITS = np.array([[0.0, 3.0, 2.9, 1.0], [4.0, 0.0, 1.0, 9.0], [0.0, 1.0, 0.0, 0.0]], np.float32)


@pytest.mark.parametrize(
    ("tokens", "measured", "ties"),
    [
        pytest.param((1, 0, 1), 0, 0, id="top-1, except for the stop token"),
        pytest.param((2, 0, 1), 0, 1, id="a near tie, and what comes after it"),
        pytest.param((3, 0, 1), 3, 0, id="top-3"),
        pytest.param((1, 2, 1), 2, 0, id="a clear lead"),
        pytest.param((1, 3, 1), 2, 0, id="a suppressed stop token"),
    ],
)
def test_teacher_forced_tokens_are_compared_with_top_1(tokens: tuple[int, ...], measured: int, ties: int) -> None:
    gate, near = teacher_forced_gate("case", tokens, LOGITS, 0.05, [3])
    assert (gate.measured, len(near)) == (measured, ties)


@pytest.mark.parametrize(("room", "kind"), [(0, "whole"), (-1, "layerwise")])
def test_memory_decides_the_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, room: int, kind: str) -> None:
    checkpoint = open_checkpoint(MINIATURE)
    monkeypatch.setattr(whole, "verify", lambda folder, target, reference: "whole")
    monkeypatch.setattr(whole, "verify_layerwise", lambda folder, target, reference, limit, store: "layerwise")
    compared = whole.comparison(checkpoint, verify_memory(checkpoint)[0] + room, tmp_path)
    assert compared(tmp_path, "genai") == kind  # type: ignore[comparison-overlap]


def test_the_command_with_little_memory(
    bundle: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tuple(case for case in shipped_cases() if case.name == "text")
    monkeypatch.setattr(layerwise, "shipped_cases", lambda: text)
    folder, store = bundle("genai"), tmp_path / "store"
    arguments = ["verify", str(folder), "--reference", str(MINIATURE), "--memory", "1MB", "--store", str(store)]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["verdict"] == "partial"
    assert json.loads((folder / "evidence" / "parity.json").read_text())["not run"]
    assert len(list(store.iterdir())) == 1
    mutations.mlp_scaled(folder, "genai")
    failed = CliRunner().invoke(app, arguments)
    assert failed.exit_code == 20
    assert "first difference: decoder layers, text, tokens 0–28, layer 3" in failed.stderr
