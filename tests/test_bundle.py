"""The stage `bundle`: a folder that tells what is in it and what it was made from."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from builder import bundle
from builder.files import sha256
from builder.recipe import load_recipe
from builder.source import parse_source
from builder.stage import Build
from patches import SETS
from tests.checkpoints import MINIATURE
from tests.processes import copied

pytestmark = pytest.mark.torch  # its input is what the stages before it make

TARGETS = {"genai": "fused", "onnxruntime": "eager"}


@pytest.fixture(scope="module")
def bundled(miniature_built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundles of the miniature, with a report that no verification wrote."""
    folder = tmp_path_factory.mktemp("bundled")
    build = Build(parse_source(str(MINIATURE)), load_recipe(), copied(miniature_built.parent, folder / "output"))
    verified = build.folder("verify")
    for target in TARGETS:
        (verified / target).mkdir(parents=True)
        (verified / target / "parity.json").write_text(target)
    (verified / "stage.json").write_text("{}")
    facts = bundle.run(build, folder / "out")
    for target in TARGETS:
        manifest = folder / "out" / target / "manifest.json"
        assert facts[target] == {"path": str(build.folder("bundle") / target), "manifest sha256": sha256(manifest)}
    return folder


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
    assert set(there) == set(os.listdir(configured))
    for name, file in there.items():
        assert file.samefile(configured / name)  # linked: the weights lie on the disk once


@pytest.mark.parametrize(("target", "attention"), TARGETS.items())
def test_it_tells_what_it_was_made_from(bundled: Path, target: str, attention: str) -> None:
    found = manifest(bundled, target)
    assert (found["target"], found["attention"]) == (target, attention)
    assert found["recipe"] == {"name": "fp32", "precision": "fp32", "max_length": 4096}
    assert found["versions"]["torch"] == version("torch")
    weights = found["checkpoint"]["files"]["model.safetensors"]
    assert weights["sha256"] == sha256(MINIATURE / "model.safetensors")
    assert set(found["patches"]) == set(SETS[attention])
    assert all(len(one["digest"]) == 12 for one in found["patches"].values())


@pytest.mark.parametrize("target", TARGETS)
def test_its_graphs_are_described_as_they_are(bundled: Path, target: str) -> None:
    import onnx

    graphs = manifest(bundled, target)["graphs"]
    assert set(graphs) == {file.name for file in (bundled / "out" / target).glob("*.onnx")}
    for name, described in graphs.items():
        model = onnx.load(str(bundled / "out" / target / name), load_external_data=False)
        for side in ("input", "output"):
            assert [one["name"] for one in described[f"{side}s"]] == [port.name for port in getattr(model.graph, side)]
        assert {node.op_type for node in model.graph.node} <= {one.rpartition(":")[2] for one in described["operators"]}


@pytest.mark.parametrize(("target", "attention"), TARGETS.items())
def test_the_evidence_lies_beside_it(bundled: Path, target: str, attention: str) -> None:
    evidence = bundled / "out" / target / "evidence"
    assert (evidence / "parity.json").read_text() == target
    assert {file.stem for file in (evidence / "patches").iterdir()} == set(SETS[attention])
    stages = {file.stem for file in (evidence / "stages").iterdir()}
    assert stages == {"fetch", "patch", "export", "optimize", "quantize", "configure", "verify"}
