"""A build of three stages that log their runs, importable as the package `demo`."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from builder.stages.engine.build import Build, Stage
from builder.stages.engine.execute import plan
from builder.targets.recipe_file import load_recipe

# Each module logs its run; `second` reads the output of `first`; a file `die` makes it fail halfway.
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
    "defaults.toml": "a = 0",
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
    """Return the stages that ran since the last call."""
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
