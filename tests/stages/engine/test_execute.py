"""The build loop on toy pipelines: which stages run, and why."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version as installed
from pathlib import Path

import pytest

from builder.stages.engine import cache_key
from builder.stages.engine.build import Build
from builder.stages.engine.cache_key import code_digests
from builder.stages.engine.execute import Event, execute
from builder.stages.engine.output_folder import read_record
from builder.targets.recipe import Target
from builder.util.errors import MissingPackageError
from builder.util.progress import progress, use_display
from tests.helpers.toy_stages import TABLE, artifacts, ran, why


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


def test_the_record_has_all_inputs_and_artifacts(build: Build) -> None:
    _, second, _ = (record for _, record in execute(build))
    first = json.loads((build.folder("first") / "stage.json").read_text(encoding="utf-8"))
    assert first["facts"] == {"length": 4096}
    assert first["components"]["recipe"] == {"max_length": 4096}
    assert first["components"]["packages"] == {"numpy": installed("numpy")}
    code = [f"demo/{name}" for name in ("__init__.py", "deepest.py", "defaults.toml", "first.py", "shared.py")]
    assert sorted(first["components"]["code"]) == sorted(code)
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
    assert why(build)["first"] == "run: demo/pins.toml removed"


def test_another_package_version_is_named(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(build)
    monkeypatch.setattr("builder.stages.engine.execute.version", lambda name: "99.0")
    assert why(build)["first"] == f"run: numpy {installed('numpy')} → 99.0"


def test_several_reasons_are_listed_or_counted(build: Build, demo: Path) -> None:
    execute(build)
    for file in ("shared.py", "deepest.py", "first.py"):
        (demo / file).write_text("x = 1\n" + (demo / file).read_text(), encoding="utf-8")
    shorter = replace(build, recipe=replace(build.recipe, max_length=1))
    text = why(shorter)["first"]
    assert text.startswith("run: recipe.max_length changed (4096 → 1), demo/deepest.py changed, ")
    assert text.endswith(", and 1 more")


def test_forcing_reruns_a_stage_and_its_readers(build: Build) -> None:
    execute(build)
    ran(build)
    assert why(build, force=["first"]) == {
        "first": "run: forced",
        "second": "run: first was rebuilt",
        "third": "cached",
    }
    execute(build, until="first", force=["first"])
    assert ran(build) == ["first"]
    assert why(build)["second"] == "run: first was rebuilt"
    execute(build)
    assert ran(build) == ["second"]


def test_a_stage_with_an_unreadable_record_runs(build: Build) -> None:
    execute(build)
    ran(build)
    (build.folder("third") / "stage.json").write_text('{"stage": "third"', encoding="utf-8")
    assert why(build)["third"] == "run: record unreadable"
    (build.folder("third") / "stage.json").unlink()
    assert why(build)["third"] == "run: record unreadable"
    execute(build)
    assert ran(build) == ["third"]


def test_a_missing_or_truncated_artifact_is_rebuilt_but_evidence_may_change(build: Build) -> None:
    execute(build)
    (build.folder("first") / "evidence" / "times.txt").write_text("fast, and longer")
    assert why(build)["first"] == "cached"
    (build.folder("first") / "one.txt").write_text("cut")
    assert why(build)["first"] == "run: 1-first/one.txt changed"
    (build.folder("first") / "one.txt").unlink()
    assert why(build)["first"] == "run: 1-first/one.txt missing"
    execute(build)
    assert (build.folder("first") / "one.txt").read_text() == "length 4096"


def test_a_missing_package_is_reported_before_anything_runs(build: Build) -> None:
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


def test_the_closure_covers_our_packages_and_no_other_path(demo: Path) -> None:
    found = closure(demo, "from builder.targets.recipe_file import Recipe")
    ours = [name for name in found if name.startswith(("builder/", "patches/"))]
    assert {*found} - {*ours} == {"demo/__init__.py"}
    # The recipe, what it imports (the targets that it may name among it), and what that imports.
    assert {
        "builder/__init__.py",
        "builder/targets/recipe_file.py",
        "builder/quantization/rules.py",
        "builder/util/errors.py",
    } < set(ours)
    assert not [name for name in ours if name.startswith("builder/graph/passes/")]


def test_an_input_that_is_not_known_yet_makes_an_unknown_key() -> None:
    known = cache_key.Components({}, {"config": "abc"}, {}, {})
    unknown = replace(known, inputs={"config": cache_key.UNKNOWN})
    assert unknown.key == cache_key.UNKNOWN
    assert cache_key.reasons(known, unknown) == ["config not known before fetch"]
    assert len(known.key) == 64


def test_progress_is_shown_by_the_registered_display() -> None:
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
    with use_display(Shown), progress("weights", 7) as advance:
        advance()
        advance(6)
    with progress("after") as advance:
        advance()
    assert seen == [("weights", 7, 1), ("weights", 7, 6), ("weights", 7, 0)]
