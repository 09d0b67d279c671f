"""The table of several bundles, from their verification reports. No torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from builder.bundle import table
from builder.cli.app import app
from builder.targets.registry import PACKAGING
from builder.targets.runners.registry import RUNTIMES
from builder.util.console_table import as_text
from builder.util.errors import BundleError
from builder.verify.report.context import Context
from builder.verify.report.exhibits import Exhibit
from builder.verify.report.gates import Gate, Report
from builder.verify.report.write import write
from builder.verify.tokens import NearTies, count_equal_tokens
from tests.helpers.bundles import edit_manifest, small_bundle
from tests.helpers.processes import python
from tests.helpers.runtimes import require


def verified(folder: Path, target: str, **facts: object) -> Path:
    """A bundle for `target` whose report has `facts`; `not_run` has the reason why there are no tokens."""
    small_bundle(folder)
    edit_manifest(folder, lambda content: content.update(target=target))
    why = facts.pop("not_run", None)
    not_run_places = {"tokens": why} if isinstance(why, str) else {}
    gates = (Gate("decoder prefill", "text", 2e-6, 1e-4),)
    write(
        Report(target, "Tiny", gates, dict(facts), not_run_places, (Exhibit("text", "case", "Hello"),)),
        folder / "evidence",
        Context(),
    )
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    versions = {"onnxruntime": "1.32.0", "onnxruntime-genai": "0.18.0", "openvino": "2026.4.1"}
    played = {"tokens": {"cases": 12, "compared": 700, "equal": 699}, "task": {"PyTorch": "41/41", "ONNX": "40/41"}}
    verified(tmp_path / "8-bundle" / "genai", "genai", versions=versions, **played)
    why = 'openvino is not installed: pip install "qwen3vl-onnx[openvino]"'
    verified(tmp_path / "8-bundle" / "openvino", "openvino", versions={}, not_run=why)
    return tmp_path


def test_each_bundle_has_a_row_from_its_evidence(output: Path) -> None:
    genai, openvino = table.rows(table.bundles_in([output]))
    assert (genai.target, genai.runtime, genai.verdict) == ("genai", "onnxruntime-genai 0.18.0", "passed")
    assert (genai.cases, genai.tokens, genai.equal) == (12, 700, 699)
    assert (genai.task, genai.status) == ("40/41 (PyTorch 41/41)", "run")
    manifest = json.loads((output / "8-bundle" / "genai" / "manifest.json").read_text())
    assert genai.bytes == sum(file["size"] for file in manifest["files"].values())
    assert (openvino.tokens, openvino.task, openvino.verdict) == (0, None, "partial")
    assert openvino.status.startswith("not run here, because openvino is not installed")
    for shown in (as_text(*table.renderables([genai, openvino])), table.markdown([genai, openvino])):
        assert "699 / 700" in shown
        assert "not run here, because" in " ".join(shown.split())


def test_tokens_of_an_inexact_bundle_are_its_fp32_copys(tmp_path: Path) -> None:
    tokens = {"cases": 3, "compared": 192, "equal": 192}
    bundle = verified(tmp_path / "int4", "openvino", tokens=tokens)
    path = bundle / "evidence" / "parity.json"
    parity = json.loads(path.read_text())
    path.write_text(json.dumps({**parity, "facts": {**parity["facts"], "quality": {}}}))
    (row,) = table.rows([bundle])
    assert row.fp32_copy
    assert "192 / 192, its fp32 copy" in table.markdown([row])


def test_the_command_takes_bundles_and_output_folders(output: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["table", str(output), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [row["target"] for row in found["bundles"]] == ["genai", "openvino"]
    one = CliRunner().invoke(app, ["table", str(output / "8-bundle" / "genai")])
    assert "onnxruntime-genai 0.18.0" in one.stdout
    table.write(table.rows(table.bundles_in([output])), output)
    assert json.loads((output / "evidence" / "bundles.json").read_text()) == found["bundles"]
    assert (output / "evidence" / "bundles.md").read_text().count("\n") == 4


def test_a_folder_without_a_verified_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="contains no bundles"):
        table.bundles_in([tmp_path])
    bundle = small_bundle(tmp_path / "genai")
    (bundle / "evidence" / "parity.json").unlink()
    with pytest.raises(BundleError, match="was never verified") as caught:
        table.rows([bundle])
    assert "verify" in str(caught.value.next)


def test_tokens_are_counted_up_to_the_first_that_differs() -> None:
    right = ([Gate("tokens", "a", 0, 0), Gate("token ids", "a", 3, 0)], NearTies(64, ()))
    wrong = ([Gate("tokens", "b", 60, 0)], NearTies(64, ()))
    tied = ([Gate("tokens", "c", 0, 0)], NearTies(64, ("token 3 …",)))
    thrown = ([Gate("tokens", "d", float("inf"), 0)], NearTies(64, ()))
    nothing: tuple[list[Gate], NearTies] = ([], NearTies(0, ()))
    assert count_equal_tokens([right, wrong, tied, thrown, nothing]) == {
        "cases": 4,
        "compared": 256,
        "equal": 64 + 4 + 63,
    }


@pytest.mark.slow
@pytest.mark.torch
def test_one_command_makes_a_bundle_for_every_runtime_each_proven_in_its_own(tmp_path: Path) -> None:
    for runtime in RUNTIMES.values():
        require(runtime.missing())
    done = python("-m", "builder", "build", "--recipe", "fp32-everywhere", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "outputs/miniature-fp32-everywhere/evidence/bundles.json").read_text())
    assert [row["target"] for row in rows] == list(PACKAGING)
    for row in rows:
        assert row["equal"] == row["tokens"] > 500, row
        assert row["task"] == rows[0]["task"], row
        assert row["status"] == "run", row
