"""Output folders of the build loop: failures, kills, a full disk, and what is taken from the build beside."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from builder.stages.engine.build import Build
from builder.stages.engine.execute import Event, execute
from builder.stages.engine.output_folder import read_record
from builder.util.errors import OutputError
from tests.helpers.toy_stages import TABLE, artifacts, ran, why

ROOT = Path(__file__).parents[3]


def test_a_stage_that_fails_half_way_leaves_no_folder_and_keeps_the_ones_before(build: Build, tmp_path: Path) -> None:
    (tmp_path / "die").touch()
    with pytest.raises(KeyboardInterrupt):
        execute(build)
    assert not build.folder("second").exists()
    assert (build.output / "2-second.part" / "deep" / "two.txt").read_text() == "half"
    ran(build)
    (tmp_path / "die").unlink()
    execute(build)
    assert ran(build) == ["second", "third"]
    assert not list(build.output.glob("*.part"))
    undisturbed = replace(build, output=tmp_path / "undisturbed")
    execute(undisturbed)
    assert artifacts(build) == artifacts(undisturbed)


def test_a_failed_rerun_keeps_what_was_built_before(build: Build, tmp_path: Path) -> None:
    execute(build)
    before = artifacts(build)
    (tmp_path / "die").touch()
    with pytest.raises(KeyboardInterrupt):
        execute(build, force=["second"])
    shutil.rmtree(build.output / "2-second.part")
    assert artifacts(build) == before


@pytest.mark.seconds
def test_a_process_that_is_killed_leaves_a_folder_to_go_on_from(build: Build, demo: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of `second`: the lock dies with the process, `first` need not run again."""
    (demo / "second.py").write_text(
        (demo / "second.py")
        .read_text()
        .replace("raise KeyboardInterrupt", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
        encoding="utf-8",
    )
    (tmp_path / "die").touch()
    program = (
        "import pathlib\n"
        "from builder.stages.engine.execute import execute\n"
        "from builder.targets.recipe_file import load_recipe\n"
        "from builder.stages.engine.build import Build, Stage\n"
        "from tests.helpers.toy_stages import TABLE\n"
        f"execute(Build('a checkpoint', load_recipe(), pathlib.Path({str(build.output)!r}), stages=TABLE))\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": f"{demo.parent}:{ROOT}", "PATH": ""},
        check=False,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert ran(build) == ["first", "second"]
    (tmp_path / "die").unlink()
    assert why(build) == {"first": "cached", "second": "run: first time", "third": "run: first time"}
    execute(build)
    assert ran(build) == ["second", "third"]
    assert artifacts(build)["2-second/deep/two.txt"] == b"length 4096" * 2


@pytest.mark.parametrize("renamed_in", [False, True])
def test_a_kill_between_the_two_renames_is_mended(build: Build, renamed_in: bool) -> None:
    execute(build)
    before = artifacts(build)
    ran(build)
    old = build.output / "1-first.old"
    if renamed_in:
        shutil.copytree(build.folder("first"), old)
    else:
        build.folder("first").rename(old)
    execute(build)
    assert ran(build) == []
    assert artifacts(build) == before


def test_a_folder_with_something_else_is_left_alone(build: Build) -> None:
    build.output.mkdir()
    (build.output / "thesis.doc").write_text("two years of work")
    (build.output / "build.json").write_text('{"tool": "another"}')
    with pytest.raises(OutputError, match="holds something else") as caught:
        execute(build)
    assert "thesis.doc" in str(caught.value.found)
    assert sorted(file.name for file in build.output.iterdir()) == ["build.json", "thesis.doc"]


def test_an_empty_folder_and_one_of_a_start_that_was_killed_are_taken(build: Build) -> None:
    build.output.mkdir()
    (build.output / ".lock").touch()
    (build.output / "build.json.part").write_text("{")
    execute(build)
    assert json.loads((build.output / "build.json").read_text()) == {
        "tool": "qwen3vl-onnx",
        "asked": "a checkpoint",
        "checkpoint": "a checkpoint",
        "recipe": "fp32",
    }


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_that_cannot_be_a_folder_is_refused(build: Build, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        execute(replace(build, output=tmp_path / place))


@pytest.fixture
def third_raises(demo: Path, tmp_path: Path) -> Callable[[str], None]:
    """`third_raises(error)`: it does, half way, as long as there is a file `full`."""

    def write(error: str) -> None:
        lines = (
            "import errno, os",
            "def run(build, out):",
            "    (out / 'large').write_text('half')",
            "    if (build.output.parent / 'full').exists():",
            f"        raise {error}",
            "    return {}",
        )
        (demo / "third.py").write_text("\n".join(lines) + "\n")
        (tmp_path / "full").touch()

    return write


@pytest.mark.parametrize(
    "error",
    [
        "OSError(errno.ENOSPC, 'a reason')",
        "OSError(errno.EDQUOT, 'a reason')",
        "OSError(errno.EFBIG, 'a reason')",
        "OSError(errno.EROFS, 'a reason', '/somewhere')",
        "OSError(errno.EACCES, 'a reason', str(out / 'large'))",
        "OSError(errno.EPERM, 'a reason', str(out / 'large').encode())",
        "OSError(errno.EACCES, 'a reason', '/somewhere', None, str(build.output))",
        "OSError(errno.EPERM, 'a reason', os.path.relpath(out / 'large'))",
    ],
)
def test_what_the_disk_refuses_is_the_users_to_mend(
    build: Build, third_raises: Callable[[str], None], tmp_path: Path, error: str
) -> None:
    """What the stage has written so far is removed; what is whole stays, and the next run goes on from there."""
    third_raises(error)
    with pytest.raises(OutputError, match="cannot be written") as caught:
        execute(build)
    assert str(build.output) in caught.value.what
    assert (caught.value.found, caught.value.exit_code) == ("a reason", 19)
    assert caught.value.next is not None
    assert sorted(path.name for path in build.output.glob("*-*")) == ["1-first", "2-second"]
    (tmp_path / "full").unlink()
    assert [step.state for step, _ in execute(build)] == ["cached", "cached", "run"]


@pytest.mark.parametrize(
    "error",
    [
        "OSError(errno.EACCES, 'a reason', '/somewhere')",
        "OSError(errno.EPERM, 'a reason')",
        "OSError(errno.EACCES, 'a reason', str(build.output) + '-beside')",
        "OSError(errno.EIO, 'a reason', str(out / 'large'))",
        "FileNotFoundError(errno.ENOENT, 'a reason', str(out / 'large'))",
    ],
)
def test_what_is_not_the_disks_fault_is_not_laid_on_it(
    build: Build, third_raises: Callable[[str], None], error: str
) -> None:
    third_raises(error)
    with pytest.raises(OSError, match="a reason"):
        execute(build)
    assert (build.output / "3-third.part" / "large").exists()


def test_a_part_that_cannot_be_removed_either_hides_no_error(
    build: Build, third_raises: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that has become read-only."""
    third_raises("OSError(errno.EROFS, 'a reason')")

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.EROFS, "another reason", str(path))

    monkeypatch.setattr("builder.stages.engine.output_folder.shutil.rmtree", refuse)
    with pytest.raises(OutputError) as caught:
        execute(build)
    assert caught.value.found == "a reason"


def test_a_second_build_into_the_same_folder_is_refused(build: Build) -> None:
    raised: list[BaseException] = []

    def second() -> None:
        try:
            execute(build)
        except OutputError as error:
            raised.append(error)

    def on_event(event: Event) -> None:
        if not raised:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    execute(build, on_event=on_event)
    assert "another build is writing" in str(raised[0])
    assert ran(build) == ["first", "second", "third"]
    execute(build)


@pytest.fixture
def beside(build: Build) -> Build:
    """A build that another one, `outputs/one`, lies beside; their first stage says nothing of the checkpoint."""
    stages = (replace(TABLE[0], shared=True), *TABLE[1:])
    one = replace(build, output=build.output.parent / "outputs" / "one", stages=stages)
    execute(one)
    ran(one)
    return replace(one, output=one.output.with_name("two"))


def test_a_shared_stage_is_taken_from_the_build_beside(beside: Build) -> None:
    """Its record says what the other one's did; every other stage runs."""
    other = beside.output.with_name("one")
    assert why(beside) == {
        "first": "link: the same as in one",
        "second": "run: first time",
        "third": "run: first time",
    }
    done = {step.stage.name: (step.state, record) for step, record in execute(beside)}
    assert ran(beside) == ["second", "third"]
    state, record = done["first"]
    known = read_record(other / "1-first")
    assert known is not None
    assert (state, record.key, record.facts, record.files) == ("link", known.key, known.facts, known.files)
    assert (beside.folder("first") / "one.txt").samefile(other / "1-first" / "one.txt")
    evidence = "1-first/evidence/times.txt"  # of the run that there was
    assert artifacts(beside) == {
        name: content for name, content in artifacts(replace(beside, output=other)).items() if name != evidence
    }
    assert set(why(beside).values()) == {"cached"}


@pytest.mark.parametrize("spoiled", ["an artifact", "the record", "the marker", "the key", "no one"])
def test_what_is_not_whole_or_not_the_same_is_not_taken(beside: Build, spoiled: str) -> None:
    other = beside.output.with_name("one")
    if spoiled == "an artifact":
        (other / "1-first" / "one.txt").write_text("cut")
    elif spoiled == "the record":
        (other / "1-first" / "stage.json").write_text("{")
    elif spoiled == "the marker":
        (other / "build.json").unlink()
    elif spoiled == "the key":
        beside = replace(beside, recipe=replace(beside.recipe, max_length=1))
    assert why(beside)["first"] == ("run: first time" if spoiled != "no one" else "link: the same as in one")


def test_a_shared_stage_that_is_forced_runs(beside: Build) -> None:
    execute(beside, force=["first"])
    assert ran(beside) == ["first", "second", "third"]


def test_a_change_in_one_build_does_not_reach_the_one_beside(beside: Build) -> None:
    """A stage that runs again makes new files; those that were linked stay as they are elsewhere."""
    execute(beside)
    longer = replace(beside, recipe=replace(beside.recipe, max_length=8192))
    execute(longer)
    assert (longer.folder("first") / "one.txt").read_text() == "length 8192"
    assert (beside.output.with_name("one") / "1-first" / "one.txt").read_text() == "length 4096"
