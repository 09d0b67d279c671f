"""A build opens its checkpoint once, and detects later changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from builder.cli.app import app
from builder.stages.engine.build import Build
from builder.stages.engine.dry_run import estimated
from builder.stages.engine.execute import execute, plan
from builder.stages.engine.prepare import prepared, reference_checkpoint
from builder.util.errors import CheckpointError
from tests.helpers.openings import count_openings


def invoke(*arguments: object) -> int:
    return CliRunner().invoke(app, [str(argument) for argument in arguments]).exit_code


def build_of(folder: Path, tmp_path: Path) -> Build:
    return prepared(str(folder), "fp32", tmp_path / "out", rehash=False, settle_again=False)


def test_plan_estimate_and_stages_share_one_opening(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = count_openings(monkeypatch)
    build = build_of(sharded, tmp_path)
    assert opened == [sharded]
    estimated(build, plan(build))
    execute(build, until="fetch")
    estimated(build, plan(build))
    assert build.checkpoint.folder == sharded
    assert opened == [sharded]


@pytest.mark.parametrize("command", [("explain",), ("build", "--dry-run"), ("build", "--until", "fetch")])
def test_a_command_opens_a_local_folder_once(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    opened = count_openings(monkeypatch)
    for _ in range(2):
        assert invoke(*command, sharded, "--output", tmp_path / "out") == 0
        assert opened == [sharded]
        opened.clear()


@pytest.mark.torch
def test_exporting_does_not_open_it_again(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = count_openings(monkeypatch)
    options = ("--output", tmp_path / "out", "--recipe", "int4-fast", "--until", "export")
    assert invoke("build", sharded, *options) == 0
    assert opened == [sharded]


def test_a_reference_is_opened_once_under_the_name_of_its_source(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = count_openings(monkeypatch)
    assert reference_checkpoint(str(sharded)).name == sharded.name
    assert reference_checkpoint(None).name == "miniature"
    assert len(opened) == 2


def test_a_relative_folder_is_recorded_with_its_absolute_path(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sharded.parent)
    build = build_of(Path(sharded.name), tmp_path)
    assert build.checkpoint.folder == sharded


@pytest.mark.parametrize("file", ["model-00001-of-00003.safetensors", "config.json"])
def test_a_file_that_changes_between_opening_and_fetch_is_an_error(sharded: Path, tmp_path: Path, file: str) -> None:
    """Its tensors would be read at the old header's offsets."""
    build = build_of(sharded, tmp_path)
    os.utime(sharded / file, ns=(1, 1))
    with pytest.raises(CheckpointError, match=f"{file} changed since it was opened") as caught:
        execute(build, until="fetch")
    assert caught.value.found == "time 1"
    assert caught.value.next
    assert not build.folder("fetch").exists()
