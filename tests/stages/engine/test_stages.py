"""The eight stages and their inputs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builder.checkpoint.source import parse_source
from builder.stages.engine import cache_key
from builder.stages.engine.build import STAGES, Build
from builder.stages.engine.cache_key import code_digests
from builder.stages.engine.execute import plan
from builder.targets.recipe_file import load_recipe
from builder.targets.runners import registry
from builder.targets.runners.registry import RUNTIMES
from tests.helpers.checkpoints import MINIATURE


def test_the_stages_are_in_order_and_each_input_comes_before() -> None:
    names = [stage.name for stage in STAGES]
    assert names == ["fetch", "patch", "export", "optimize", "quantize", "configure", "verify", "bundle"]
    for number, stage in enumerate(STAGES):
        assert set(stage.inputs) <= {"source", "config", "calibration", "heldout", *names[:number]}
        assert all(hasattr(load_recipe(), field) for field in stage.fields)


def test_the_build_loop_is_not_part_of_a_stages_code() -> None:
    """Otherwise every change in the build loop would rerun `export`."""
    for stage in STAGES:
        assert not {"builder/stages/engine/execute.py", "builder/stages/engine/build.py"} & set(
            code_digests(stage.module_name, stage.files)
        )


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    """After a move a stale pattern would otherwise leave the key unnoticed, and the stage would not run again."""
    with pytest.raises(ValueError, match="builder/nowhere"):
        code_digests("builder.stages.export", ("builder/nowhere/*.py",))
    assert code_digests("builder.stages.export", ("no_such_package/*.py",))


@pytest.mark.parametrize(
    ("recipe", "name", "stage"), [("int4", "calibration", "quantize"), ("fp32", "heldout", "verify")]
)
def test_cases_next_to_a_checkpoint_are_an_input_of_stages_that_read_them(
    tmp_path: Path, recipe: str, name: str, stage: str
) -> None:
    checkpoint = Path(shutil.copytree(MINIATURE, tmp_path / "checkpoint"))
    build = Build(parse_source(str(checkpoint)), load_recipe(recipe), tmp_path / "out")

    def digest() -> str:
        (step,) = [each for each in plan(build, None, []) if each.stage.name == stage]
        return step.components.inputs[name]

    assert digest() == "none"
    (tmp_path / name).mkdir()
    (tmp_path / name / "cases.jsonl").write_text("{}\n")
    first = digest()
    assert first != "none"
    (tmp_path / name / "one.png").write_bytes(b"an image")
    second = digest()
    assert second != first
    (tmp_path / name / "one.png").write_bytes(b"b image")
    assert digest() not in (first, second)


def test_calibration_is_not_an_input_where_nothing_is_calibrated(tmp_path: Path) -> None:
    build = Build(parse_source(str(MINIATURE)), load_recipe("int4-fast"), tmp_path / "out")
    (step,) = [each for each in plan(build, None, []) if each.stage.name == "quantize"]
    assert step.components.inputs["calibration"] == "not read"


def test_a_runtime_that_has_come_is_a_reason_to_verify_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Build(parse_source(str(MINIATURE)), load_recipe("int4-openvino"), tmp_path / "out")
    runtime = RUNTIMES["openvino"]

    def components(**known: Any) -> cache_key.Components:
        monkeypatch.setattr(registry, "RUNTIMES", {"openvino": replace(runtime, **known)})
        found = {step.stage.name: step.components for step in plan(build)}
        assert not [name for name in found["bundle"].packages if name.startswith("runtime")]
        return found["verify"]

    gone = components(missing=lambda: "it is not installed: see /some/path", versions=dict)
    come = components(missing=lambda: None, versions=lambda: {"openvino": "9.9"})
    assert cache_key.reasons(gone, come) == ["runtime of openvino not here → openvino 9.9"]
    assert cache_key.reasons(come, gone) == ["runtime of openvino openvino 9.9 → not here"]
