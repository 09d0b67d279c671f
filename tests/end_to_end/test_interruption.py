"""`qwen3vl-onnx build`, killed and restarted: complete stages stay, and the result is the same bytes.

The process is killed with SIGKILL at a chosen call to the operating system, which an audit hook sees, so that every
stage, however short, is hit where it is meant to be hit.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess
from typing import Literal

import pytest

from builder.stages.engine.build import STAGES
from tests.helpers.checkpoints import MINIATURE
from tests.helpers.processes import ROOT, artifacts, copied, python

pytestmark = pytest.mark.torch

NAMES = tuple(stage.name for stage in STAGES)
# `half`: one file of the stage is there, and more are to come. `complete`: all are, and the folder is not yet renamed.
Moment = Literal["half", "complete"]
# What the fixture `miniature_built` is built from, as the command line says it.
CONFIGURED = (str(MINIATURE), "--until", "configure")
# Python imports a module of this name when it starts.
SITECUSTOMIZE = """
import os
import signal
import sys

PART, MOMENT = os.environ["KILL_IN"], os.environ["KILL_AT"]
seen = 0


def hook(event, arguments):
    global seen
    if event not in ("open", "os.link", "os.rename") or not isinstance(arguments[0], str | os.PathLike):
        return
    paths = [os.fspath(argument) for argument in arguments[:2] if isinstance(argument, str | os.PathLike)]
    if MOMENT == "complete":
        hit = event == "os.rename" and paths[0] == PART
    else:
        seen += any(path.startswith(PART + "/") for path in paths if isinstance(path, str))
        hit = seen == 2
    if hit:
        os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(hook)
"""


def build(output: Path, *options: str, settings: Mapping[str, str] | None = None) -> CompletedProcess[str]:
    arguments = ("-m", "builder", "build", "--output", output, *options)
    return python(*arguments, cwd=output.parent, settings=settings)


def killed(output: Path, stage: str, moment: Moment, *options: str) -> None:
    """A build that is killed in `stage`, and leaves only its `.part`."""
    shim = output.parent / "shim"
    shim.mkdir(exist_ok=True)
    (shim / "sitecustomize.py").write_text(SITECUSTOMIZE)
    folder = output / f"{NAMES.index(stage) + 1}-{stage}"
    part = folder.with_name(folder.name + ".part")
    settings = {"PYTHONPATH": f"{shim}{os.pathsep}{ROOT}", "KILL_IN": str(part), "KILL_AT": moment}
    done = build(output, *options, settings=settings)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    assert any(file.is_file() for file in part.rglob("*"))
    assert (part / "stage.json").exists() is (moment == "complete")
    assert not folder.exists()


def states(done: CompletedProcess[str]) -> Mapping[str, str]:
    """Stage → `cached` or `run`, as the command reported."""
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stderr.splitlines() if line[:1].isdigit()]
    return {words[0].partition("-")[2]: words[1].rstrip(":") for words in lines}


def test_a_second_build_runs_nothing_and_reports_it(miniature_built: Path, tmp_path: Path) -> None:
    output = copied(miniature_built.parent, tmp_path / "out")
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*") if file.name not in ("build.json", ".lock")}
    done = build(output, *CONFIGURED)
    assert states(done) == dict.fromkeys(NAMES[:6], "cached")
    assert done.stderr.splitlines()[-1] == "nothing to run: nothing changed"
    assert done.stdout.splitlines() == [str(output / "6-configure")]
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_kills_in_the_short_stages(miniature_built: Path, tmp_path: Path) -> None:
    """`fetch`, `quantize` and `configure`, each killed twice; the stages between them stay unchanged."""
    output = copied(miniature_built.parent, tmp_path / "out")
    for folder in ("1-fetch", "5-quantize", "6-configure"):
        shutil.rmtree(output / folder)
    for stage in ("fetch", "quantize", "configure"):
        killed(output, stage, "half", *CONFIGURED)
        killed(output, stage, "complete", *CONFIGURED)
    done = build(output, *CONFIGURED)
    assert states(done) == {**dict.fromkeys(NAMES[:5], "cached"), "configure": "run"}
    assert not list(output.glob("*.part"))
    assert artifacts(output) == artifacts(miniature_built.parent)


def test_a_kill_between_the_two_renames_of_a_rerun(miniature_built: Path, tmp_path: Path) -> None:
    """The old folder is renamed, the new folder is not in place: the old folder is restored."""
    output = copied(miniature_built.parent, tmp_path / "out")
    killed(output, "configure", "complete", *CONFIGURED, "--force", "configure")
    assert (output / "6-configure.old").is_dir()
    assert states(build(output, *CONFIGURED)) == dict.fromkeys(NAMES[:6], "cached")
    assert not (output / "6-configure.old").exists()
    assert artifacts(output) == artifacts(miniature_built.parent)


@pytest.mark.slow
def test_a_build_that_is_killed_in_every_stage(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for stage in NAMES:
        killed(output, stage, "half")
        if stage != "verify":  # the longest; its second half would be like any other's
            killed(output, stage, "complete")
    done = build(output)
    assert states(done) == {**dict.fromkeys(NAMES[:7], "cached"), "bundle": "run"}
    assert not list(output.glob("*.part"))
    assert artifacts(output) == artifacts(whole)
    again = build(output)
    assert set(states(again).values()) == {"cached"}
    assert again.stderr.splitlines()[-1] == "nothing to run: nothing changed"
    assert again.stdout.splitlines()[-1] == str(output / "8-bundle" / "genai")
