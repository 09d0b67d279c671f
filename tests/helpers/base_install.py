"""The base install, without extras: `site-packages` of links, and the command line with nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.helpers.processes import ROOT, python

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `site-packages` with links to the declared dependencies and theirs, without extras."""
    folder = tmp_path_factory.mktemp("base")
    for found in required(map(Requirement, PROJECT["dependencies"])):
        for name in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (folder / name).exists():
                (folder / name).symlink_to(Path(str(found.locate_file(name))))
    return folder


def required(requirements: Iterable[Requirement]) -> list[Distribution]:
    """The installed distributions that the requirements resolve to."""
    found: dict[str, Distribution] = {}
    waiting = [(each, extra) for each in requirements for extra in ("", *each.extras)]
    seen = set()
    while waiting:
        requirement, extra = waiting.pop()
        name = re.sub("[-_.]+", "-", requirement.name).lower()
        if (name, extra) in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add((name, extra))
        found[name] = distribution(name)
        for needed in map(Requirement, found[name].requires or ()):
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                bare = Requirement(str(needed).partition(";")[0])
                waiting += [(bare, each) for each in ("", *bare.extras)]
    return list(found.values())


def without_extra(base: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`qwen3vl-onnx` with the base install only: -S excludes this environment's packages."""
    return python("-S", "-m", "builder", *arguments, cwd=cwd, settings={"PYTHONPATH": f"{ROOT}{os.pathsep}{base}"})
