"""The same inputs give the same bytes, wherever and however they are built."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from builder.targets.recipe import Target
from builder.targets.recipe_file import load_recipe
from ci.environments import environment
from tests.conftest import Built
from tests.helpers.processes import ROOT, artifacts, checkout, python

pytestmark = pytest.mark.torch

SMALLEST = "deepstack0"
# Everything that may differ between two machines of one kind.
OTHER = {"PYTHONHASHSEED": "4242", "OMP_NUM_THREADS": "2", "LC_ALL": "C", "TZ": "Asia/Tokyo"}
SOURCE_FILE = re.compile(rb"/[\w.-]+/[\w./-]*\.py\b")


def test_a_small_checkpoint_in_another_process(built: Built, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Different hash seed, threads, locale and checkpoint path; graphs of one target, weights and settings."""
    recipe = replace(load_recipe("fp32"), targets=(Target("genai", "fused"),))
    expected = artifacts(built(checkpoint(SMALLEST), recipe).parent)
    moved = Path(shutil.copytree(checkpoint(SMALLEST), tmp_path / "moved here"))
    (tmp_path / "one.toml").write_text('precision = "fp32"\ntargets = ["genai"]\n')
    arguments = ("build", moved, "--recipe", "one.toml", "--until", "configure", "--output", "out")
    done = python("-m", "builder", *arguments, cwd=tmp_path, settings=OTHER)
    assert done.returncode == 0, done.stderr
    assert len([name for name in expected if name.endswith((".onnx", ".onnx.data"))]) > 6
    assert artifacts(tmp_path / "out") == expected


def test_nothing_of_the_machine_is_in_the_artifacts(miniature_built: Path) -> None:
    output = miniature_built.parent
    private = [str(path).encode() for path in (ROOT, Path.home(), output, tempfile.gettempdir())]
    graphs = 0
    for name in artifacts(output):
        content = (output / name).read_bytes()
        graphs += name.endswith(".onnx")
        if name.endswith(".data"):
            continue
        assert not [path for path in private if len(path) > 1 and path + b"/" in content], name
        assert name.endswith(".diff") or not SOURCE_FILE.search(content), name
    assert graphs >= 6 * 4  # three graphs of two targets, through four stages


@pytest.mark.slow
def test_the_miniature_from_another_checkout_and_environment(whole: Path, tmp_path: Path) -> None:
    """Graphs, data, settings and manifest, to the last byte."""
    root = checkout(tmp_path / "another checkout")
    executable = environment(tmp_path / "another environment")
    done = python("-m", "builder", "build", cwd=tmp_path, root=root, executable=executable, settings=OTHER)
    assert done.returncode == 0, done.stderr
    output = tmp_path / "outputs" / "miniature-fp32"
    code = json.loads((output / "3-export" / "stage.json").read_text())["components"]["code"]
    assert code == json.loads((whole / "3-export" / "stage.json").read_text())["components"]["code"]
    found = artifacts(output)
    assert {f"8-bundle/{target}/manifest.json" for target in ("genai", "onnxruntime")} <= set(found)
    assert found == artifacts(whole)
