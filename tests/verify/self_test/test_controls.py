"""Test that verification fails at the right place for each way to break a bundle."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from typer.testing import CliRunner

from builder.checkpoint.load import open_checkpoint
from builder.cli.app import app
from builder.reference.cases import Case, Suite, held_out, shipped_cases
from builder.targets.clients import pipeline
from builder.targets.runners.genai import GenaiBundle
from builder.util.errors import VerificationError
from builder.verify import whole
from builder.verify.self_test import mutations
from builder.verify.self_test.mutants import Mutation
from tests.helpers.checkpoints import MINIATURE
from tests.helpers.shown import shown

if TYPE_CHECKING:
    from builder.reference.model import Reference

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[3]
TARGETS = ("genai", "onnxruntime")
SMALL = Suite(tuple(case for case in shipped_cases() if case.name in ("one image", "wide, tall")), tokens=6)

CONTROLS: tuple[tuple[Mutation, str, str], ...] = (
    (mutations.deepstack_zeroed, "genai", "deepstack features"),
    (mutations.deepstack_zeroed, "onnxruntime", "deepstack features"),
    (mutations.rotary_axes_swapped, "genai", "decoder layers"),
    (mutations.rotary_axes_swapped, "onnxruntime", "decoder layers"),
    (mutations.image_features_shifted, "genai", "embeddings"),
    # The client merges features here, so the vision encoder's output is shifted.
    (mutations.image_features_shifted, "onnxruntime", "image features"),
    (mutations.attention_mask_off_by_one, "genai", "decoder layers"),
    (mutations.attention_mask_off_by_one, "onnxruntime", "decoder layers"),
    *((edit, target, "pixel values") for edit in (mutations.mean_changed, mutations.std_changed) for target in TARGETS),
    *((mutations.patch_size_changed, target, "pixel values") for target in TARGETS),
    *((mutations.newline_lost, target, "token ids") for target in TARGETS),
)


@pytest.mark.parametrize("target", TARGETS)
def test_an_intact_bundle_passes(miniature_built: Path, reference: Reference, target: str) -> None:
    report = whole.verify(miniature_built / target, target, reference, SMALL)
    assert report.ok, shown(report)
    assert report.first_failure is None


@pytest.mark.parametrize(
    ("mutation", "target", "place"), CONTROLS, ids=[f"{change.__name__}-{target}" for change, target, _ in CONTROLS]
)
def test_a_broken_bundle_fails_at_the_broken_place(
    bundle: Callable[[str], Path], reference: Reference, mutation: Mutation, target: str, place: str
) -> None:
    broken = bundle(target)
    mutation(broken, target)
    report = whole.verify(broken, target, reference, SMALL)
    assert not report.ok
    assert report.first_failure is not None
    assert report.first_failure.place == place, shown(report)
    if target == "genai" and place == "pixel values":  # through the runtime's own processor too
        failing = {gate.place for gate in report.gates if not gate.ok}
        assert failing & {"runtime's pixel values", "tokens of the runtime's pixels"}
    ties = next(gate for gate in report.gates if gate.case == "near ties")
    assert ties.measured == 0, "a broken graph's own error excuses its tokens"


def test_gates_after_the_first_difference_fail_too(bundle: Callable[[str], Path], reference: Reference) -> None:
    """Gates that are never first: the runtime's own processor, tokens from it, held-out answers."""
    broken = bundle("genai")
    tasks = tuple(case for case in held_out(open_checkpoint(MINIATURE)) if case.name == "number")[:3]
    assert len(tasks) == 3
    mutations.deepstack_zeroed(broken, "genai")
    mutations.mean_changed(broken, "genai")
    report = whole.verify(broken, "genai", reference, Suite(SMALL.cases, tasks, tokens=6))
    failing = {gate.place for gate in report.gates if not gate.ok}
    assert failing >= {"runtime's pixel values", "tokens", "tokens of the runtime's pixels", "held-out accuracy"}, (
        shown(report)
    )


@pytest.mark.parametrize("target", TARGETS)
def test_wrong_positions_fail_at_position_ids(
    bundle: Callable[[str], Path], reference: Reference, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """No setting of a bundle changes only the positions, so the client's code is patched."""
    right = pipeline.position_ids

    def off(*arguments: Any) -> tuple[np.ndarray, int]:
        positions, delta = right(*arguments)
        return positions + np.array([0, 1, 0]).reshape(3, 1, 1), delta

    monkeypatch.setattr(pipeline, "position_ids", off)
    report = whole.verify(bundle(target), target, reference, SMALL, fail_fast=True)
    assert report.first_failure is not None
    assert report.first_failure.place == "position ids"


def test_the_command_exits_with_20_and_names_the_place(
    bundle: Callable[[str], Path], miniature: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole, "whole_suite", lambda checkpoint, folder: SMALL)
    folder = bundle("onnxruntime")
    passed = CliRunner().invoke(app, ["verify", str(folder), "--reference", str(miniature)])
    assert passed.exit_code == 0, passed.output

    mutations.rotary_axes_swapped(folder, "onnxruntime")
    failed = CliRunner().invoke(app, ["verify", str(folder), "--reference", str(miniature)])
    assert failed.exit_code == VerificationError.exit_code == 20
    assert "first difference: decoder layers, one image, tokens 0–77, layer 0" in failed.stderr
    written = json.loads((folder / "evidence" / "parity.json").read_text())
    assert written["verdict"] == "failed"
    assert written["first difference"].startswith("decoder layers")


@pytest.mark.slow
def test_the_complete_suite_in_a_separate_process(bundle: Callable[[str], Path], miniature: Path) -> None:
    broken = bundle("genai")
    mutations.deepstack_zeroed(broken, "genai")
    command = [sys.executable, "-m", "builder", "verify", str(broken), "--reference", str(miniature)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 20, done.stderr
    assert "first difference: deepstack features" in done.stderr


def test_without_deepstack_the_miniature_reads_no_numbers(
    bundle: Callable[[str], Path], miniature_built: Path, miniature: Path
) -> None:
    """Images are read through DeepStack, text is not."""
    cases = held_out(open_checkpoint(miniature))
    numbers = [case for case in cases if case.name == "number"]
    texts = [case for case in cases if not case.images]
    assert len(numbers) >= 10
    assert len(texts) >= 4

    intact, broken = GenaiBundle(miniature_built / "genai"), bundle("genai")
    mutations.deepstack_zeroed(broken, "genai")
    zeroed = GenaiBundle(broken)
    assert _right(intact, numbers) >= 0.9 * len(numbers)
    assert _right(zeroed, numbers) <= 0.2 * len(numbers)
    assert _right(intact, texts) == _right(zeroed, texts) == len(texts)


def _right(runner: GenaiBundle, cases: Sequence[Case]) -> int:
    answers = (runner.text(tuple(runner.tokens(runner.prepare(case.prompt, case.images), 16))) for case in cases)
    return sum(answer == case.answer for answer, case in zip(answers, cases, strict=True))
