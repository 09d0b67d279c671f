"""Test `verify_bundle` and its command: errors, files written, failing bundles."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from builder.checkpoint.load import open_checkpoint
from builder.cli.app import app
from builder.reference.cases import Suite, held_out, shipped_cases, whole_suite
from builder.util.errors import BundleError
from builder.util.files import sha256
from builder.verify import whole
from builder.verify.graphs.per_graph import graph_gates
from builder.verify.graphs.sessions import Graphs
from builder.verify.report.gates import Gate, guarded
from builder.verify.self_test.mutations import patch_size_changed, rotary_axes_swapped
from builder.verify.tolerances import FP32
from tests.helpers.edits import edit_json, edit_tensors
from tests.helpers.openings import count_openings

if TYPE_CHECKING:
    from builder.reference.model import Reference

pytestmark = pytest.mark.torch

SUITE = Suite(tuple(case for case in shipped_cases() if case.name == "one image"), tokens=4)


@pytest.fixture
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "whole_suite", lambda checkpoint, folder: SUITE)


def files(folder: Path) -> Mapping[str, tuple[int, str]]:
    """Return modification time and digest of every file outside `evidence/`."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in paths}
    return {
        name: (path.stat().st_mtime_ns, sha256(path))
        for name, path in named.items()
        if not name.startswith("evidence/")
    }


def command(bundle: Path, reference: Path) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, ["verify", str(bundle), "--reference", str(reference), "--json"])
    payload: dict[str, Any] = json.loads(result.stdout)
    assert payload["ok"] == (result.exit_code == 0)
    return result.exit_code, payload


def test_the_complete_suite_is_every_case_and_the_held_out_set(miniature: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(miniature)
    suite = whole_suite(checkpoint, tmp_path)
    assert [case for case in suite.cases if not any(case.drawn)] == list(shipped_cases())
    assert sum(any(case.drawn) for case in suite.cases) >= 4
    assert suite.tasks == held_out(checkpoint)
    assert suite.tokens == 64
    assert len({case.name for case in suite.cases}) == len(suite.cases) >= 10
    assert all(path.is_file() for case in (*suite.cases, *suite.tasks) for path in case.images)


def test_a_folder_without_a_manifest_is_not_a_bundle(tmp_path: Path, miniature: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        whole.verify_bundle(tmp_path, open_checkpoint(miniature))
    code, payload = command(tmp_path, miniature)
    assert (code, payload["error"]) == (21, "BundleError")
    assert not list(tmp_path.iterdir())


def test_a_bundle_for_an_unknown_runtime_is_refused(bundle: Callable[[str], Path], miniature: Path) -> None:
    folder = bundle("genai")
    (folder / "manifest.json").write_text(json.dumps({"target": "coreml"}))
    with pytest.raises(BundleError, match="coreml"):
        whole.verify_bundle(folder, open_checkpoint(miniature))


def test_a_graph_that_does_not_load_is_named(bundle: Callable[[str], Path], miniature: Path) -> None:
    folder = bundle("genai")
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"model\.onnx cannot be loaded"):
        whole.verify_bundle(folder, open_checkpoint(miniature))


@pytest.mark.parametrize("target", ["genai", "onnxruntime"])
def test_incomplete_settings_are_refused(bundle: Callable[[str], Path], miniature: Path, target: str) -> None:
    folder = bundle(target)
    _own_copy(folder / "pipeline.json")
    edit_json("pipeline.json", lambda settings: settings.pop("image_token"))(folder)
    with pytest.raises(BundleError, match="settings") as caught:
        whole.verify_bundle(folder, open_checkpoint(miniature))
    assert "image_token" in str(caught.value.found)


@pytest.mark.usefixtures("_few")
@pytest.mark.parametrize("target", ["genai", "onnxruntime"])
def test_only_evidence_is_written(
    bundle: Callable[[str], Path],
    miniature_built: Path,
    miniature: Path,
    tmp_path: Path,
    target: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An earlier report is replaced, without writing through its hard link."""
    folder = bundle(target)
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text("an earlier report")
    (folder / "evidence").mkdir()
    os.link(elsewhere, folder / "evidence" / "parity.json")
    before = files(folder), files(miniature_built), files(miniature)

    opened = count_openings(monkeypatch)
    code, payload = command(folder, miniature)
    assert (code, opened) == (0, [miniature])
    assert (files(folder), files(miniature_built), files(miniature)) == before
    assert elsewhere.read_text() == "an earlier report"
    assert {path.name for path in (folder / "evidence").iterdir()} == {
        *("parity.json", "parity.txt", "exhibits.json"),
        *("report.html", "report.md", "junit.xml"),
    }
    written = json.loads((folder / "evidence" / "parity.json").read_text())
    assert written == {key: value for key, value in payload.items() if key != "ok"}
    assert (written["target"], written["verdict"], written["first difference"]) == (target, "passed", None)
    assert f"{target} against PyTorch" in (folder / "evidence" / "parity.txt").read_text()


@pytest.mark.usefixtures("_few")
def test_other_weights_fail(bundle: Callable[[str], Path], miniature: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(miniature, tmp_path / "other"))

    def double(tensors: dict[str, Any]) -> None:
        tensors["model.language_model.layers.2.mlp.up_proj.weight"] *= 2

    edit_tensors("model.safetensors", double)(other)
    code, payload = command(bundle("onnxruntime"), other)
    assert code == 20
    assert payload["first difference"] == "decoder layers: one image, tokens 0–77, layer 2"


@pytest.mark.usefixtures("_few")
@pytest.mark.parametrize("target", ["genai", "onnxruntime"])
def test_another_architecture_fails_with_a_reason(
    bundle: Callable[[str], Path], checkpoint: Callable[[str], Path], target: str
) -> None:
    code, payload = command(bundle(target), checkpoint("deepstack0"))
    assert code == 20
    assert payload["verdict"] == "failed"
    assert any(gate["measured"] == "inf" and gate["detail"] for gate in payload["gates"])


def test_a_runtime_that_raises_fails_the_gate(bundle: Callable[[str], Path], reference: Reference) -> None:
    """The patch size differs from the graph's."""
    folder = bundle("onnxruntime")
    patch_size_changed(folder, "onnxruntime")
    report = whole.verify(folder, "onnxruntime", reference, SUITE)
    (tokens,) = [gate for gate in report.gates if gate.place == "tokens" and gate.case != "near ties"]
    assert math.isinf(tokens.measured)
    assert "pixel_values" in tokens.detail


def test_the_error_of_a_broken_decoder_excuses_no_token(bundle: Callable[[str], Path], reference: Reference) -> None:
    folder = bundle("genai")
    rotary_axes_swapped(folder, "genai")
    graphs = Graphs.load(folder, True, reference.checkpoint.text.hidden)
    (case,) = SUITE.cases
    prompt = reference.prepare(case.prompt, case.images)
    gates, logit_error = graph_gates(case.name, graphs, reference, prompt)
    spread = float(reference.logits(prompt, ()).std())
    assert max(gate.measured for gate in gates) > FP32
    assert logit_error == pytest.approx(FP32 * spread)


def test_a_user_error_within_a_gate_propagates() -> None:
    def throw(error: Exception) -> list[Gate]:
        raise error

    with pytest.raises(BundleError):
        guarded("tokens", "any", throw, BundleError("not a bundle"))
    (gate,) = guarded("tokens", "any", throw, RuntimeError("wrong shape\nin the kernel"))
    assert not gate.ok
    assert gate.detail == "RuntimeError: wrong shape"


def _own_copy(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
