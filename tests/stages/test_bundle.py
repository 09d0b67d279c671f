"""The stage `bundle`: a folder whose manifest describes its files and sources."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from builder.checkpoint.load import open_checkpoint
from builder.checkpoint.source import parse_source
from builder.checkpoint.tensors import EMBEDDINGS
from builder.graph.ports import packed_width
from builder.stages import bundle
from builder.stages.engine.build import Build
from builder.targets.recipe_file import load_recipe
from builder.util.files import sha256
from builder.verify.report.context import Context
from builder.verify.report.gates import Gate, Report
from builder.verify.report.write import write
from patches import SETS
from tests.helpers.checkpoints import MINIATURE
from tests.helpers.processes import copied

pytestmark = pytest.mark.torch  # its input is what the stages before it make

TARGETS = {"genai": "fused", "onnxruntime": "eager"}


@pytest.fixture(scope="module")
def bundled(miniature_built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundles of the miniature, with a report that was not written by a verification."""
    folder = tmp_path_factory.mktemp("bundled")
    copied(miniature_built.parent, folder / "output")
    build = build_in(folder)
    verified = build.folder("verify")
    for target in TARGETS:
        write(Report(target, "miniature", (Gate("tokens", "text", 0, 0),), {}), verified / target, Context())
    (verified / "stage.json").write_text("{}")
    facts = bundle.run(build, folder / "out")
    for target in TARGETS:
        manifest = folder / "out" / target / "manifest.json"
        assert facts[target] == {"path": str(build.folder("bundle") / target), "manifest sha256": sha256(manifest)}
    return folder


def build_in(folder: Path) -> Build:
    return Build(parse_source(str(MINIATURE)), load_recipe(), folder / "output")


def manifest(bundled: Path, target: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((bundled / "out" / target / "manifest.json").read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("target", TARGETS)
def test_every_file_is_listed_with_its_bytes(bundled: Path, target: str) -> None:
    folder = bundled / "out" / target
    there = {file.name: file for file in folder.iterdir() if file.is_file() and file.name != "manifest.json"}
    assert manifest(bundled, target)["files"] == {
        name: {"size": file.stat().st_size, "sha256": sha256(file)} for name, file in sorted(there.items())
    }
    configured = bundled / "output" / "6-configure" / target
    assert set(there) == {*os.listdir(configured), "README.md", "bom.cdx.json", "LICENSE"} - {"manifest.json"}
    for name in {*os.listdir(configured)} - {"manifest.json"}:
        assert there[name].samefile(configured / name)  # linked: the weights lie on the disk once


@pytest.mark.parametrize(("target", "attention"), TARGETS.items())
def test_the_manifest_describes_the_sources(bundled: Path, target: str, attention: str) -> None:
    found = manifest(bundled, target)
    assert (found["target"], found["attention"]) == (target, attention)
    assert found["recipe"] == {
        "name": "fp32",
        "precision": "fp32",
        "provider": "cpu",
        "max_length": 4096,
        "rules": [],
        "limits": None,
    }
    assert found["versions"]["torch"] == version("torch")
    weights = found["checkpoint"]["files"]["model.safetensors"]
    assert weights["sha256"] == sha256(MINIATURE / "model.safetensors")
    assert set(found["patches"]) == set(SETS[attention])
    assert all(len(patch["digest"]) == 12 for patch in found["patches"].values())


def test_every_file_of_the_checkpoint_is_listed_with_its_bytes(bundled: Path) -> None:
    """Weights are hashed when they are written, other files when they are fetched."""
    for target in TARGETS:
        files = manifest(bundled, target)["checkpoint"]["files"]
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
        assert files == {
            name: {"size": (MINIATURE / name).stat().st_size, "sha256": sha256(MINIATURE / name)} for name in files
        }


@pytest.mark.parametrize("target", TARGETS)
def test_no_weight_is_read_again(bundled: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def noted(path: Path) -> str:
        hashed.append(path.name)
        return sha256(path)

    monkeypatch.setattr(bundle, "sha256", noted)
    build, folder = build_in(bundled), bundled / "out" / target
    (configured,) = [each for each in build.recipe.targets if each.runtime == target]
    assert bundle.manifest(build, configured, folder) == manifest(bundled, target)
    data = {file.name for file in folder.glob("*.data")}
    assert data == {"model.onnx.data", "vision_encoder.onnx.data"}
    assert set(hashed) == {file.name for file in folder.iterdir() if file.is_file()} - data - {"manifest.json"}


@pytest.mark.parametrize("target", TARGETS)
def test_tied_embeddings_are_read_from_the_decoders_file(bundled: Path, target: str) -> None:
    """In plain ONNX Runtime, from the bundle in place."""
    import numpy as np
    import onnxruntime

    opened = open_checkpoint(MINIATURE)
    assert opened.text.tied
    session = onnxruntime.InferenceSession(str(bundled / "out" / target / "embeddings.onnx"))
    ids = np.array([[0, opened.text.vocab - 1, 7]])
    feed = {"input_ids": ids}
    if target == "genai":
        feed["image_features"] = np.zeros((0, packed_width(opened)), np.float32)
    (rows,) = session.run(None, feed)
    np.testing.assert_array_equal(rows[..., : opened.text.hidden], opened.read(EMBEDDINGS)[ids].astype(np.float32))


@pytest.mark.parametrize("target", TARGETS)
def test_its_graphs_are_described_as_they_are(bundled: Path, target: str) -> None:
    import onnx

    graphs = manifest(bundled, target)["graphs"]
    assert set(graphs) == {file.name for file in (bundled / "out" / target).glob("*.onnx")}
    for name, described in graphs.items():
        model = onnx.load(str(bundled / "out" / target / name), load_external_data=False)
        for side in ("input", "output"):
            assert [entry["name"] for entry in described[f"{side}s"]] == [
                port.name for port in getattr(model.graph, side)
            ]
        assert {node.op_type for node in model.graph.node} <= {
            kind.rpartition(":")[2] for kind in described["operators"]
        }


@pytest.mark.parametrize(("target", "attention"), TARGETS.items())
def test_evidence_is_in_the_bundle(bundled: Path, target: str, attention: str) -> None:
    evidence = bundled / "out" / target / "evidence"
    report = bundled / "output" / "7-verify" / target
    assert (evidence / "parity.json").samefile(report / "parity.json")
    page = (evidence / "report.html").read_text(encoding="utf-8")
    assert sha256(bundled / "out" / target / "manifest.json") in page
    assert "sha256" not in (report / "report.html").read_text(encoding="utf-8")
    assert {file.stem for file in (evidence / "patches").iterdir()} == set(SETS[attention])
    stages = {file.stem for file in (evidence / "stages").iterdir()}
    assert stages == {"fetch", "patch", "export", "optimize", "quantize", "configure", "verify"}
