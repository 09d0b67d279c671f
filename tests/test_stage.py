"""The build loop on pipelines of the tests' own: what runs, why, and what a kill leaves behind."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, cast

import pytest

from builder import key, loop
from builder.console import progress, shown_by
from builder.errors import MissingPackageError, OutputError
from builder.key import code_digests
from builder.loop import Event, execute, plan
from builder.output import read_record
from builder.recipe import Target, load_recipe
from builder.source import parse_source
from builder.stage import STAGES, Build, Stage
from tests.checkpoints import MINIATURE

ROOT = Path(__file__).parents[1]
# Each module writes down that it ran; `second` reads what `first` made; a file `die` makes it fail half way.
MODULES = {
    "__init__.py": "",
    "first.py": """
        from demo.shared import note

        def run(build, out):
            note(build, "first")
            (out / "evidence").mkdir()
            (out / "evidence" / "times.txt").write_text("slow")
            (out / "one.txt").write_text(f"length {build.recipe.max_length}")
            return {"length": build.recipe.max_length}
        """,
    "second.py": """
        from . import shared

        def run(build, out):
            shared.note(build, "second")
            (out / "deep").mkdir()
            (out / "deep" / "two.txt").write_text("half")
            if (build.output.parent / "die").exists():
                raise KeyboardInterrupt
            (out / "deep" / "two.txt").write_text((build.folder("first") / "one.txt").read_text() * 2)
            return {}
        """,
    "third.py": """
        def run(build, out):
            from demo.shared import note
            note(build, "third")
            return {}
        """,
    "shared.py": """
        from demo import deepest

        def note(build, name):
            with (build.output.parent / "log").open("a") as log:
                log.write(name + "\\n")
        """,
    "deepest.py": "FACT = 1",
    "unrelated.py": "FACT = 2",
}
TABLE = (
    Stage("first", (), ("max_length",), ("numpy",), ("demo/*.toml",), module="demo.first"),
    Stage("second", ("first",), ("targets",), (), module="demo.second"),
    Stage("third", (), (), (), module="demo.third"),
)


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the importable package `demo`."""
    folder = tmp_path / "lib" / "demo"
    folder.mkdir(parents=True)
    for name, text in MODULES.items():
        (folder / name).write_text(textwrap.dedent(text), encoding="utf-8")
    monkeypatch.syspath_prepend(folder.parent)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "demo"]:
        del sys.modules[name]


@pytest.fixture
def build(demo: Path, tmp_path: Path) -> Build:
    source = cast(Any, "a checkpoint")
    return Build(source=source, recipe=load_recipe(), output=tmp_path / "out", stages=TABLE)


def ran(build: Build) -> list[str]:
    """Stages that ran since the last call."""
    log = build.output.parent / "log"
    names = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return names


def why(build: Build, **options: Any) -> dict[str, str]:
    return {step.stage.name: step.text for step in plan(build, **options)}


def artifacts(build: Build) -> dict[str, bytes]:
    return {
        file.relative_to(build.output).as_posix(): file.read_bytes()
        for file in build.output.rglob("*.txt")
        if file.is_file()
    }


def test_every_stage_runs_once_and_then_none(build: Build) -> None:
    events: list[Event] = []
    done = execute(build, on_event=events.append)
    assert ran(build) == ["first", "second", "third"]
    assert [step.text for step, _ in done] == ["run: first time"] * 3
    assert [(event.step.stage.name, event.record is None) for event in events][:2] == [
        ("first", True),
        ("first", False),
    ]
    before = artifacts(build)

    assert why(build) == {"first": "cached", "second": "cached", "third": "cached"}
    assert [step.state for step, _ in execute(build)] == ["cached"] * 3
    assert ran(build) == []
    assert artifacts(build) == before
    assert not list(build.output.glob("*.part"))
    assert not list(build.output.glob("*.old"))


def test_planning_writes_nothing_and_runs_nothing(build: Build) -> None:
    assert set(why(build).values()) == {"run: first time"}
    assert ran(build) == []
    assert not build.output.exists()


def test_the_record_says_what_was_made_from_what(build: Build) -> None:
    _, second, _ = (record for _, record in execute(build))
    first = json.loads((build.folder("first") / "stage.json").read_text(encoding="utf-8"))
    assert first["facts"] == {"length": 4096}
    assert first["components"]["recipe"] == {"max_length": 4096}
    assert first["components"]["packages"] == {"numpy": installed("numpy")}
    code = ["demo/__init__.py", "demo/deepest.py", "demo/first.py", "demo/shared.py"]
    assert sorted(first["components"]["code"]) == code
    assert first["files"] == {"one.txt": len("length 4096")}
    assert first["cost"]["peak_rss"] > 10e6
    assert first["cost"]["written"] >= len("length 4096")
    assert all(first["cost"][name] >= 0 for name in ("wall_s", "cpu_s", "read"))
    assert second.components.inputs == {"first": first["key"]}
    assert second.after == {"first": first["started"]}
    assert read_record(build.folder("second")) == second


def test_until_stops_there(build: Build) -> None:
    execute(build, until="second")
    assert ran(build) == ["first", "second"]
    assert list(why(build, until="first")) == ["first"]
    assert why(build)["third"] == "run: first time"


def test_a_changed_recipe_field_is_named_with_both_values(build: Build) -> None:
    execute(build)
    shorter = replace(build, recipe=replace(build.recipe, max_length=2048))
    assert why(shorter) == {
        "first": "run: recipe.max_length changed (4096 → 2048)",
        "second": "run: first changed",
        "third": "cached",
    }
    eager = replace(build, recipe=replace(build.recipe, targets=(Target("genai", "eager"),)))
    assert why(eager) == {
        "first": "cached",
        "second": "run: recipe.targets changed (genai fused, onnxruntime eager → genai eager)",
        "third": "cached",
    }
    ran(build)
    execute(shorter)
    assert ran(build) == ["first", "second"]
    assert artifacts(build)["2-second/deep/two.txt"] == b"length 2048" * 2


@pytest.mark.parametrize(
    ("file", "reached"),
    [
        ("first.py", ["first", "second"]),
        ("deepest.py", ["first", "second", "third"]),
        ("__init__.py", ["first", "second", "third"]),
        ("third.py", ["third"]),
        ("unrelated.py", []),
    ],
)
def test_a_changed_file_reruns_what_imports_it_however_far_down(
    build: Build, demo: Path, file: str, reached: list[str]
) -> None:
    execute(build)
    ran(build)
    (demo / file).write_text((demo / file).read_text() + "\n# another word\n", encoding="utf-8")
    steps = why(build)
    assert [name for name in steps if steps[name] != "cached"] == reached
    if reached:
        assert steps[reached[0]] == f"run: demo/{file} changed"
    execute(build)
    assert ran(build) == reached


def test_a_file_that_a_stage_reads_counts_too(build: Build, demo: Path) -> None:
    execute(build)
    (demo / "pins.toml").write_text("a = 1", encoding="utf-8")
    assert why(build)["first"] == "run: demo/pins.toml added"
    execute(build)
    (demo / "pins.toml").unlink()
    assert why(build)["first"] == "run: demo/pins.toml is gone"


def test_another_package_version_is_named(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(build)
    monkeypatch.setattr(loop, "version", lambda name: "99.0")
    assert why(build)["first"] == f"run: numpy {installed('numpy')} → 99.0"


def test_several_reasons_are_all_said_or_counted(build: Build, demo: Path) -> None:
    execute(build)
    for file in ("shared.py", "deepest.py", "first.py"):
        (demo / file).write_text("x = 1\n" + (demo / file).read_text(), encoding="utf-8")
    shorter = replace(build, recipe=replace(build.recipe, max_length=1))
    text = why(shorter)["first"]
    assert text.startswith("run: recipe.max_length changed (4096 → 1), demo/deepest.py changed, ")
    assert text.endswith(", and 1 more")


def test_forcing_reruns_a_stage_and_what_is_made_from_it(build: Build) -> None:
    execute(build)
    ran(build)
    assert why(build, force=["first"]) == {
        "first": "run: forced",
        "second": "run: first made anew",
        "third": "cached",
    }
    execute(build, until="first", force=["first"])
    assert ran(build) == ["first"]
    assert why(build)["second"] == "run: first made anew"
    execute(build)
    assert ran(build) == ["second"]


def test_an_unreadable_record_is_no_record(build: Build) -> None:
    execute(build)
    ran(build)
    (build.folder("third") / "stage.json").write_text('{"stage": "third"', encoding="utf-8")
    assert why(build)["third"] == "run: record unreadable"
    (build.folder("third") / "stage.json").unlink()
    assert why(build)["third"] == "run: record unreadable"
    execute(build)
    assert ran(build) == ["third"]


def test_a_missing_or_cut_artifact_is_made_again_but_evidence_may_change(build: Build) -> None:
    execute(build)
    (build.folder("first") / "evidence" / "times.txt").write_text("fast, and longer")
    assert why(build)["first"] == "cached"
    (build.folder("first") / "one.txt").write_text("cut")
    assert why(build)["first"] == "run: 1-first/one.txt changed"
    (build.folder("first") / "one.txt").unlink()
    assert why(build)["first"] == "run: 1-first/one.txt is gone"
    execute(build)
    assert (build.folder("first") / "one.txt").read_text() == "length 4096"


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
        "from builder.loop import execute\n"
        "from builder.recipe import load_recipe\n"
        "from builder.stage import Build, Stage\n"
        f"from tests.test_stage import TABLE\n"
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

    monkeypatch.setattr("builder.output.shutil.rmtree", refuse)
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


def test_a_missing_package_is_told_before_anything_runs(build: Build) -> None:
    needy = replace(TABLE[2], packages=("no-such-distribution",))
    with pytest.raises(MissingPackageError, match=r"third needs no-such-distribution"):
        execute(replace(build, stages=(*TABLE[:2], needy)))
    assert ran(build) == []
    execute(replace(build, stages=(*TABLE[:2], needy)), until="second")


def closure(demo: Path, text: str) -> list[str]:
    (demo / "probe.py").write_text(textwrap.dedent(text), encoding="utf-8")
    return sorted(name for name in code_digests("demo.probe") if name != "demo/probe.py")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import demo.deepest", ["demo/__init__.py", "demo/deepest.py"]),
        ("from demo import deepest as d", ["demo/__init__.py", "demo/deepest.py"]),
        ("from demo.deepest import FACT", ["demo/__init__.py", "demo/deepest.py"]),
        ("from .deepest import FACT", ["demo/__init__.py", "demo/deepest.py"]),
        ("from . import deepest, unrelated", ["demo/__init__.py", "demo/deepest.py", "demo/unrelated.py"]),
        ("def f():\n    if f:\n        import demo.deepest", ["demo/__init__.py", "demo/deepest.py"]),
        ("import json, numpy.linalg", ["demo/__init__.py"]),
        ("import demo.absent", ["demo/__init__.py"]),
        (
            "if TYPE_CHECKING:\n    import demo.deepest\nelse:\n    import demo.unrelated",
            ["demo/__init__.py", "demo/unrelated.py"],
        ),
    ],
)
def test_imports_are_found_wherever_they_stand(demo: Path, text: str, found: list[str]) -> None:
    assert closure(demo, text) == found
    assert "demo" not in sys.modules


def test_the_closure_reaches_our_own_packages_and_takes_no_path(demo: Path) -> None:
    found = closure(demo, "from builder.recipe import Recipe")
    ours = [name for name in found if name.startswith(("builder/", "patches/"))]
    assert {*found} - {*ours} == {"demo/__init__.py"}
    # The recipe, what it imports (the targets that it may name among it), and what that imports.
    assert {"builder/__init__.py", "builder/recipe.py", "builder/rules.py", "builder/errors.py"} < set(ours)
    assert not [name for name in ours if name.startswith("builder/passes/")]


def test_the_stages_are_in_order_and_each_input_comes_before() -> None:
    names = [stage.name for stage in STAGES]
    assert names == ["fetch", "patch", "export", "optimize", "quantize", "configure", "verify", "bundle"]
    for number, stage in enumerate(STAGES):
        assert set(stage.inputs) <= {"source", "config", "calibration", "heldout", *names[:number]}
        assert all(hasattr(load_recipe(), field) for field in stage.fields)


def test_the_loop_is_no_part_of_a_stages_code() -> None:
    """Else every word changed in the loop would export everything again."""
    for stage in STAGES:
        assert not {"builder/loop.py", "builder/stage.py"} & set(code_digests(stage.module_name, stage.files))


def test_an_input_that_is_not_known_yet_makes_an_unknown_key() -> None:
    known = key.Components({}, {"config": "abc"}, {}, {})
    unknown = replace(known, inputs={"config": key.UNKNOWN})
    assert unknown.key == key.UNKNOWN
    assert key.reasons(known, unknown) == ["config not known before fetch"]
    assert len(known.key) == 64


def test_progress_is_shown_by_whoever_asked() -> None:
    seen: list[tuple[str, int | None, int]] = []

    class Shown:
        def __init__(self, label: str, total: int | None) -> None:
            self.label, self.total = label, total

        def __enter__(self) -> Callable[..., None]:
            return lambda steps=1: seen.append((self.label, self.total, steps))

        def __exit__(self, *error: object) -> None:
            seen.append((self.label, self.total, 0))

    with progress("alone", 2) as advance:
        advance()
    with shown_by(Shown), progress("weights", 7) as advance:
        advance()
        advance(6)
    with progress("after") as advance:
        advance()
    assert seen == [("weights", 7, 1), ("weights", 7, 6), ("weights", 7, 0)]


@pytest.mark.parametrize(
    ("recipe", "name", "stage"), [("int4", "calibration", "quantize"), ("fp32", "heldout", "verify")]
)
def test_cases_beside_a_checkpoint_are_an_input_of_what_reads_them(
    tmp_path: Path, recipe: str, name: str, stage: str
) -> None:
    checkpoint = Path(shutil.copytree(MINIATURE, tmp_path / "checkpoint"))
    build = Build(parse_source(str(checkpoint)), load_recipe(recipe), tmp_path / "out")

    def told() -> str:
        (step,) = [one for one in plan(build, None, []) if one.stage.name == stage]
        return step.components.inputs[name]

    assert told() == "none"
    (tmp_path / name).mkdir()
    (tmp_path / name / "cases.jsonl").write_text("{}\n")
    first = told()
    assert first != "none"
    (tmp_path / name / "one.png").write_bytes(b"a picture")
    second = told()
    assert second != first
    (tmp_path / name / "one.png").write_bytes(b"b picture")
    assert told() not in (first, second)


def test_calibration_is_no_input_where_nothing_is_calibrated(tmp_path: Path) -> None:
    build = Build(parse_source(str(MINIATURE)), load_recipe("int4-fast"), tmp_path / "out")
    (step,) = [one for one in plan(build, None, []) if one.stage.name == "quantize"]
    assert step.components.inputs["calibration"] == "not read"
