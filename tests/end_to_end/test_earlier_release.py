"""The same proof on an earlier transformers, in a virtual environment of its own.

The environment is kept in `.cache/`; it holds that one release, and reuses every other package of this one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ci.environments import with_releases
from patches import verified
from tests.helpers.processes import ROOT, checkout, python

pytestmark = [pytest.mark.torch, pytest.mark.slow]

EARLIER = "5.18.0"
TARGETS = ("genai", "onnxruntime")


@pytest.fixture(scope="module")
def earlier() -> Path:
    """A Python whose transformers is `EARLIER`."""
    folder = ROOT / ".cache" / f"venv-transformers-{EARLIER}"
    executable = with_releases(folder, {"transformers": EARLIER})
    done = python("-c", "import transformers; print(transformers.__version__)", cwd=folder, executable=executable)
    assert done.stdout.strip() == EARLIER, done.stderr
    return executable


@pytest.fixture(scope="module")
def newest() -> str:
    """The newest release that the patches are verified on."""
    return verified.in_order(verified.read().lines)[-1]


def told(executable: Path, *arguments: object, cwd: Path, root: Path = ROOT) -> dict[str, Any]:
    """What the command line prints with --json, after a good end."""
    done = python("-m", "builder", *arguments, "--json", cwd=cwd, root=root, executable=executable)
    assert done.returncode == 0, done.stdout + done.stderr
    payload: dict[str, Any] = json.loads(done.stdout)
    return payload


def test_every_patch_is_verified_and_some_upstream_differs(earlier: Path, newest: str, tmp_path: Path) -> None:
    rows = told(earlier, "patches", cwd=tmp_path)["patches"]
    assert {(row["release"], row["state"]) for row in rows} == {(EARLIER, "verified")}
    assert {row["name"] for row in rows} == set(verified.read().digests)
    digests = verified.read().digests
    assert [name for name in digests if digests[name][EARLIER] != digests[name][newest]]


def test_every_patch_passes_its_check_there(earlier: Path, tmp_path: Path) -> None:
    """Recording again runs the checks, finds what it knows, and changes nothing."""
    root = checkout(tmp_path / "checkout")
    recorded = told(earlier, "patches", "--record", cwd=tmp_path, root=root)["recorded"]
    assert {(one["release"], one["new"]) for one in recorded} == {(EARLIER, False)}
    assert (root / "patches" / "verified.toml").read_bytes() == verified.FILE.read_bytes()


def test_the_miniature_is_built_and_every_gate_holds(earlier: Path, tmp_path: Path) -> None:
    bundles = told(earlier, "build", cwd=tmp_path)["bundles"]
    assert set(bundles) == set(TARGETS)
    for target in TARGETS:
        bundle = tmp_path / bundles[target]
        report = json.loads((bundle / "evidence" / "parity.json").read_text(encoding="utf-8"))
        assert report["facts"]["versions"]["transformers"] == EARLIER
        assert all(gate["ok"] for gate in report["gates"])
        manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["versions"]["transformers"] == EARLIER
        assert {one["release"] for one in manifest["patches"].values()} == {EARLIER}
