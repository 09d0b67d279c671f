"""Bundles for OpenVINO, in OpenVINO: tokens equal PyTorch's, and broken graphs are detected."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from builder.bundle.generate import answer, open_bundle
from builder.checkpoint.load import open_checkpoint
from builder.checkpoint.source import parse_source
from builder.reference.cases import Suite, held_out, shipped_cases
from builder.stages.configure import lay_out
from builder.stages.engine.build import Build
from builder.stages.engine.execute import execute
from builder.targets.recipe import Recipe, Target
from builder.targets.recipe_file import load_recipe
from builder.targets.registry import PACKAGING
from builder.targets.runners.registry import RUNTIMES, open_runner
from builder.util.errors import MissingPackageError, RecipeError
from builder.util.files import link
from builder.util.json_files import read_json
from builder.verify import whole
from builder.verify.image_preprocessor import PLACE
from builder.verify.self_test.mutations import deepstack_zeroed, preprocessor_brighter
from tests.conftest import Built
from tests.helpers.checkpoints import MINIATURE
from tests.helpers.runtimes import require_openvino
from tests.helpers.shown import shown

if TYPE_CHECKING:
    from builder.reference.model import Reference
    from builder.verify.report.gates import Report

NAME = "openvino"
FEW = tuple(case for case in shipped_cases() if case.name in ("text", "one image"))
RECIPE = Recipe("fp32-openvino", "fp32", (Target(NAME, "eager"),), 4096)


@pytest.fixture
def folder(built: Built, tmp_path: Path) -> Path:
    """The miniature's bundle, of which a test may replace files (they are links)."""
    copy = tmp_path / NAME
    for file in sorted((built(MINIATURE, RECIPE) / NAME).iterdir()):
        link(file, copy / file.name)
    return copy


def failing(report: Report) -> set[str]:
    return {gate.place for gate in report.gates if not gate.ok}


@pytest.mark.torch
def test_tokens_and_held_out_accuracy_equal_pytorch(folder: Path, reference: Reference) -> None:
    require_openvino()
    tasks = held_out(reference.checkpoint)
    report = whole.verify(folder, NAME, reference, Suite(FEW, tasks, tokens=32))
    assert report.verdict == "passed", shown(report)
    assert {"openvino", "onnxruntime"} <= set(report.facts["versions"])
    assert report.facts["tokens"] == {"cases": 2, "compared": 64, "equal": 64}
    assert report.facts["task"]["ONNX"] == report.facts["task"]["PyTorch"] == f"36/{len(tasks)}"
    assert all(gate.measured < 1.001 for gate in report.gates if gate.place == PLACE)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("change", "places"),
    [
        (deepstack_zeroed, {"deepstack features", "tokens"}),
        (preprocessor_brighter, {PLACE}),
    ],
    ids=["DeepStack zeroed", "the preprocessor, 1 % brighter"],
)
def test_mutations_are_detected(
    change: Callable[[Path, str], None], places: set[str], folder: Path, reference: Reference
) -> None:
    require_openvino()
    change(folder, NAME)
    report = whole.verify(folder, NAME, reference, Suite(FEW, tokens=32))
    assert failing(report) == places, shown(report)


@pytest.mark.torch
def test_the_bundled_program_and_generate_agree(folder: Path, reference: Reference) -> None:
    require_openvino()
    case = held_out(reference.checkpoint)[0]
    arguments = ("--prompt", case.prompt, "--image", str(case.images[0]))
    command = [sys.executable, str(folder / "openvino_pipeline.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert (result.returncode, result.stdout) == (0, f"{case.answer}\n"), result.stderr
    pieces: list[str] = []
    answer(folder, case.prompt, case.images, max_new_tokens=16, on_text=pieces.append)
    assert "".join(pieces) == case.answer


@pytest.mark.torch
def test_without_openvino_verification_is_partial(
    folder: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = 'openvino is not installed: pip install "qwen3vl-onnx[openvino]"'
    monkeypatch.setitem(RUNTIMES, NAME, replace(RUNTIMES[NAME], missing=lambda: why))
    report = whole.verify(folder, NAME, reference, Suite(FEW[:1], tokens=4))
    assert (report.verdict, report.not_run) == ("partial", {"tokens": why})
    assert {gate.measured for gate in report.gates if gate.place == PLACE} == {0.0}  # in ONNX Runtime
    assert open_runner(folder, NAME).not_run == why
    with pytest.raises(MissingPackageError) as caught:
        open_bundle(folder)
    assert caught.value.found == why


@pytest.mark.slow
@pytest.mark.torch
def test_int4_is_within_the_recipes_limits(tmp_path: Path) -> None:
    require_openvino()
    build = Build(parse_source(str(MINIATURE)), load_recipe("int4-openvino"), tmp_path / "int4")
    execute(build)
    parity: Mapping[str, Any] = read_json(build.folder("bundle") / NAME / "evidence" / "parity.json")
    assert parity["verdict"] == "passed"
    assert parity["facts"]["tokens"]["equal"] == parity["facts"]["tokens"]["compared"]  # with its fp32 copy
    assert math.isfinite(parity["facts"]["quality"]["largest lead"])


@pytest.mark.parametrize(
    ("precision", "message"),
    [("bf16", "the provider cpu does not compute in bf16"), ("fp16", f"the target `{NAME}` is built in fp32")],
)
def test_it_is_built_in_fp32(precision: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f'like = "{precision}"\nprovider = "cpu"\ntargets = ["{NAME}"]\n')
    with pytest.raises(RecipeError, match=message):
        load_recipe(file)


def test_it_contains_both_programs_and_the_preprocessor(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(MINIATURE)
    (tmp_path / "filled").mkdir()
    roles = lay_out(tmp_path / "filled", checkpoint, RECIPE, RECIPE.targets[0], tmp_path / "out")
    assert roles["image_preprocessor.onnx"] == "image_preprocessor"
    assert (tmp_path / "out" / "image_preprocessor.onnx").is_file()
    configs = PACKAGING[NAME].configs(checkpoint, RECIPE, RECIPE.targets[0])
    assert {"pipeline.py", "openvino_pipeline.py"} <= set(configs)
