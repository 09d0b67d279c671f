"""Test `ci/verify.sh` with a stub of the builder, and once with the real builder."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.checkpoints import MINIATURE
from tests.helpers.hub_server import HubServer, Repository
from tests.helpers.processes import ROOT, python

pytestmark = pytest.mark.seconds

SCRIPT = ROOT / "ci" / "verify.sh"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
REPORTS = ("report.html", "report.md", "junit.xml", "parity.json", "parity.txt")
TARGETS = ("genai", "onnxruntime")

# A stub of Python: its virtual environments contain the stub builder below, and pip installs nothing.
PRETENDING = """#!/usr/bin/env bash
case "$1 $2" in
"-m venv") mkdir -p "${!#}/bin" && cp "$0" "${!#}/bin/python" && cp "$PRETENDED" "${!#}/bin/qwen3vl-onnx" ;;
"-m pip") echo "${!#}" >>pip.log ;;
*) exec "$REAL" "$@" ;;
esac
"""
BUILDER = """#!/usr/bin/env bash
# Stub builder. Lines of `ends`: command, exit code, verdict.
echo "$@" >>calls.log
read -r _ code verdict <<<"$(grep "^$1 " ends)"
reports() {
  for form in report.html report.md junit.xml parity.txt; do echo "$2 $form" >"$1/$form"; done
  echo "{\\"verdict\\": \\"$2\\"}" >"$1/parity.json"
}
case "$1" in
build | verify) if [[ $verdict == none ]]; then exit "$code"; fi ;;&
explain)
  # `gone`: the builder's error for a missing download, until --force fetch.
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
    """A user's folder in which the script runs."""

    folder: Path
    settings: Mapping[str, str]

    def run(self, ends: Mapping[str, tuple[int, str]] | None = None, **settings: str) -> tuple[int, str]:
        """Run the script; return its exit code and output."""
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
        return {path.name for path in (self.folder / "reports").iterdir() if path.is_dir()}


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


def test_a_passing_build_leaves_reports_and_verdict(place: Place) -> None:
    code, output = place.run()
    assert code == 0
    assert place.read("reports/verdict") == "passed\n"
    assert place.reports() == set(TARGETS)
    assert {path.name for path in (place.folder / "reports" / "genai").iterdir()} == set(REPORTS)
    assert re.fullmatch(r"[0-9a-f]{16}\n", place.read("reports/cache-key"))
    assert "RECIPE     fp32" in output
    assert "build --rehash" not in place.read("calls.log")
    assert "build --recipe fp32 --rehash\n" in place.read("calls.log")


def test_a_second_run_installs_nothing_and_has_the_same_cache_key(place: Place) -> None:
    place.run()
    key = place.read("reports/cache-key")
    place.run()
    assert place.read("pip.log").count("\n") == 1
    assert place.read("reports/cache-key") == key
    place.run({"build": (0, "partial")})
    assert place.read("reports/cache-key") != key


@pytest.mark.parametrize(
    ("ends", "code", "verdict", "reports"),
    [
        pytest.param({"build": (0, "partial")}, 0, "partial", set(TARGETS), id="partial"),
        pytest.param({"build": (20, "failed")}, 20, "failed", set(TARGETS), id="a gate fails"),
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
        pytest.param({"CASES": "one.toml"}, "partial", id="nothing else compared what is left out"),
        pytest.param({"GOLDEN": "golden.json", "BUNDLE": "outputs/one/8-bundle/genai"}, "partial", id="no build"),
    ],
)
def test_partial_comparisons(place: Place, settings: Mapping[str, str], verdict: str) -> None:
    place.run()
    assert place.run({"verify": (0, "partial")}, **settings)[0] == 0
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
    # A folder is not a download: its error is reported.
    assert place.run(gone)[0] == 10


def test_the_builder_exits_with_10_for_a_missing_download_until_forced(tmp_path: Path) -> None:
    """Check the exit codes that the script relies on."""
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
def test_invalid_settings_are_refused_and_no_folder_is_emptied(
    place: Place, settings: Mapping[str, str], words: str
) -> None:
    (place.folder / "theirs").mkdir()
    (place.folder / "theirs" / "file").write_text("kept", encoding="utf-8")
    code, output = place.run(None, **settings)
    assert code == 2
    assert words in output
    assert place.read("theirs/file") == "kept"
    assert not (place.folder / "calls.log").exists()


def test_every_setting_is_explained_and_printed(place: Place) -> None:
    explained = re.findall(r"^#   ([A-Z]+) ", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
    _, output = place.run()
    assert re.findall(r"^([A-Z]+) +\S", output, re.MULTILINE) == explained
