"""Random checkpoints of other shapes, from their config to tokens in both runtimes, against PyTorch.

Random weights know nothing, so that every gate rests on the arithmetic alone; what may tie, ties
(builder/verify/tokens.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from builder.checkpoint.load import open_checkpoint
from builder.reference.cases import Suite, shipped_cases
from builder.reference.model import Reference
from builder.targets.recipe import Target
from builder.targets.recipe_file import load_recipe
from builder.verify.report.gates import Report
from builder.verify.whole import verify
from tests.conftest import Built
from tests.helpers.checkpoints import SHAPES
from tests.helpers.shown import shown

pytestmark = pytest.mark.torch

SMALLEST = "deepstack0"
FEW = Suite(
    tuple(case for case in shipped_cases() if case.name in ("text", "tall, wide", "sides ≡ 16 mod 64")), tokens=8
)


def compared(folder: Path, target: str, checkpoint: Path, suite: Suite | None = None) -> Report:
    return verify(folder / target, target, Reference(open_checkpoint(checkpoint)), suite)


def test_the_smallest_shape_on_genai(built: Built, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(SMALLEST)
    recipe = replace(load_recipe("fp32"), targets=(Target("genai", "fused"),))
    report = compared(built(folder, recipe), "genai", folder, FEW)
    assert report.ok, shown(report)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["genai", "onnxruntime"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(built: Built, checkpoint: Callable[[str], Path], shape: str, target: str) -> None:
    folder = checkpoint(shape)
    report = compared(built(folder, load_recipe("fp32")), target, folder)
    print(shown(report))
    assert report.ok, shown(report)
    places = {gate.place for gate in report.gates if gate.case == "own size"}
    assert ("runtime's pixel values" in places) == (target == "genai")


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_with_eager_attention_on_genai(built: Built, checkpoint: Callable[[str], Path], shape: str) -> None:
    folder = checkpoint(shape)
    report = compared(built(folder, load_recipe("fp32-eager")), "genai", folder)
    print(shown(report))
    assert report.ok, shown(report)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "target"), [("fp32", "genai"), ("fp32", "onnxruntime"), ("fp32-eager", "genai")])
def test_the_trained_miniature(built: Built, miniature: Path, recipe: str, target: str) -> None:
    report = compared(built(miniature, load_recipe(recipe)), target, miniature)
    print(shown(report))
    assert report.ok, shown(report)
    right = report.facts["task"]
    assert right["ONNX"] == right["PyTorch"]
