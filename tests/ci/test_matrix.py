"""Test the matrix of releases without builds."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from builder.util.errors import MissingPackageError
from ci import matrix
from ci.environments import own_packages, with_releases
from ci.matrix import Combination, Row

RELEASES = {"transformers": ("5.24.0", "5.18.0"), "onnxruntime": ("1.32.0", "1.30.0"), "onnxruntime-genai": ("0.18.0",)}


def rows(broken: Callable[[Combination], bool]) -> list[Row]:
    return [
        Row(
            each,
            "everything",
            "failed" if broken(each) else "passed",
            "genai: decoder step: one" if broken(each) else "",
        )
        for each in matrix.planned(RELEASES)
    ]


def using(**releases: str) -> Callable[[Combination], bool]:
    return lambda each: releases.items() <= each.releases.items()


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


def test_all_combinations_are_planned_and_the_oldest_runs_the_newest_bundles() -> None:
    planned = matrix.planned(RELEASES)
    own = [tuple(each.releases.values()) for each in planned if each.builder is None]
    assert len(own) == len(set(own)) == 4
    (mixed,) = (each for each in planned if each.builder)
    assert mixed == Combination({axis: some[-1] for axis, some in RELEASES.items()}, builder="5.24.0")
    # It runs directly after the first, before another build overwrites those bundles.
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
            lambda each: each.builder is not None,
            [
                "a bundle built with transformers 5.24.0 on transformers 5.18.0, onnxruntime 1.30.0, "
                "onnxruntime-genai 0.18.0"
            ],
            id="a bundle of another release",
        ),
        pytest.param(lambda each: True, [matrix.EVERY], id="all"),
    ],
)
def test_failing_releases_are_named(broken: Callable[[Combination], bool], names: Sequence[str]) -> None:
    assert matrix.blamed(rows(broken)) == names
    shown = matrix.table(rows(broken), RELEASES)
    for name in names:
        assert f"Broken: {name}." in shown


def test_the_exit_code_shows_whether_a_combination_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matrix, "axes", lambda: RELEASES)
    monkeypatch.setattr(matrix, "run", lambda each, outputs: Row(each, "everything", "passed", ""))
    assert matrix.main(["--write", str(tmp_path / "docs" / "matrix.md")]) == 0
    text = (tmp_path / "docs" / "matrix.md").read_text(encoding="utf-8")
    assert text.strip() == capsys.readouterr().out.strip()
    assert text.count("| passed |") == 5
    assert "| onnxruntime-genai | 0.18.0 | the same release |" in text
    monkeypatch.setattr(matrix, "run", lambda each, outputs: Row(each, "nothing", "error", "a | b"))
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
            id="other releases than requested",
        ),
    ],
)
def test_a_verdict_counts_only_for_the_requested_releases(
    reports: Sequence[Mapping[str, Any]], verdict: str, found: str
) -> None:
    row = matrix._judged(matrix.planned(RELEASES)[0], "everything", reports)
    assert (row.verdict, row.found) == (verdict, found)


def test_a_process_without_json_is_an_error_with_its_last_line(tmp_path: Path) -> None:
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho 'cannot load it' >&2\nexit 139\n")
    dying.chmod(stat.S_IRWXU)
    assert matrix._run_json(dying, "build") == {"ok": False, "what": "ended with 139: cannot load it"}
    row = matrix._built(matrix.planned(RELEASES)[0], dying, tmp_path)
    assert (row.verdict, row.found) == ("error", "ended with 139: cannot load it")


def test_no_temporary_folder_gets_into_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    payload = {"ok": False, "what": f"cannot load {tmp_path}/5.24.0/8-bundle/genai"}
    monkeypatch.setattr(matrix, "_run_json", lambda *arguments: payload)
    combination = Combination({axis: version(axis) for axis in RELEASES})
    row = matrix.run(combination, tmp_path)
    assert (row.verdict, row.found) == ("error", "cannot load 5.24.0/8-bundle/genai")


@pytest.mark.seconds
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
