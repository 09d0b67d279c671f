"""Test lossy bundles: graphs are verified exactly, losses within the limits of the manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builder.bundle.dequantize import RoundingError
from builder.bundle.layout import MANIFEST
from builder.checkpoint.load import open_checkpoint
from builder.reference.cases import Suite, shipped_cases
from builder.reference.model import Reference
from builder.targets.recipe import Limits
from builder.targets.recipe_file import load_recipe
from builder.util.errors import BundleError
from builder.util.json_files import read_json
from builder.verify import quantized, whole
from builder.verify.quantized import LossLimits, weight_gates
from builder.verify.report.gates import PLACES, Report
from builder.verify.self_test.mutations import deepstack_levels_swapped
from builder.verify.self_test.quantized_mutations import nibbles_swapped, scales_shifted, zero_points_shifted
from tests.conftest import Built
from tests.helpers.checkpoints import MINIATURE
from tests.helpers.shown import shown

pytestmark = pytest.mark.torch

LIMITS: dict[str, Any] = vars(load_recipe("int4").limits)
SUITE = Suite(tuple(case for case in shipped_cases() if case.name == "one image"), tokens=4)


@pytest.fixture
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "whole_suite", lambda checkpoint, folder, more=(): SUITE)


def edit_recipe(bundle: Path, **changes: Any) -> None:
    """Change the recipe in the manifest."""
    path = bundle / MANIFEST
    manifest = dict(read_json(path))
    manifest["recipe"] = {**manifest["recipe"], **changes}
    path.write_text(json.dumps(manifest))


def failing(report: Report) -> set[str]:
    return {gate.place for gate in report.gates if not gate.ok}


def test_the_miniature_passes_in_every_place(finished: Callable[[str], Path]) -> None:
    found = read_json(finished("int4") / "evidence" / "parity.json")
    assert (found["verdict"], found["first difference"]) == ("passed", None)
    places = {gate["place"] for gate in found["gates"]}
    assert set(PLACES) - places == {"decoded image", "image preprocessor"}
    proved = [gate["case"] for gate in found["gates"] if gate["place"] == "decoder prefill"]
    assert all(any(case.startswith(name) for case in proved) for name in ("text", "one image", "wide, tall"))
    assert found["facts"]["quality"]["positions"]["positions"] > 1000
    assert len(found["facts"]["weights"]) == len({weight["tensor"] for weight in found["facts"]["weights"]}) > 40


@pytest.mark.usefixtures("_few")
def test_the_limits_of_a_bundle_are_those_of_its_manifest(lossy: Callable[[str], Path]) -> None:
    folder = lossy("int4")
    loose = {**LIMITS, "kl_mean": 0.5, "kl_p99": 2.0, "same_top": 0.8}  # only thirty positions instead of the suite's
    edit_recipe(folder, limits=loose)
    report = whole.verify_bundle(folder, open_checkpoint(MINIATURE))
    assert report.verdict == "passed", shown(report)
    assert {"weights", "KL divergence", "generated tokens"} <= {gate.place for gate in report.gates}

    edit_recipe(folder, limits={**loose, "kl_mean": 1e-9, "weight": 0.1})
    report = whole.verify_bundle(folder, open_checkpoint(MINIATURE))
    assert failing(report) == {"weights", "KL divergence"}
    assert report.first_failure is not None
    assert report.first_failure.place == "weights"


@pytest.mark.usefixtures("_few")
def test_without_limits_a_bundle_has_to_be_exact(lossy: Callable[[str], Path]) -> None:
    folder = lossy("int4")
    edit_recipe(folder, limits=None)
    report = whole.verify_bundle(folder, open_checkpoint(MINIATURE))
    assert report.first_failure is not None
    assert report.first_failure.place == "vision layers"
    assert "KL divergence" not in {gate.place for gate in report.gates}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"limits": {"weight": 0.1}}, id="limits that are missing"),
        pytest.param({"limits": {**LIMITS, "speed": 1}}, id="a limit of nothing"),
        pytest.param({"limits": {**LIMITS, "weight": "x"}}, id="a limit of another type"),
        pytest.param({"limits": [1, 2]}, id="not a table"),
    ],
)
def test_limits_that_cannot_be_read_are_refused(lossy: Callable[[str], Path], changes: dict[str, Any]) -> None:
    folder = lossy("int4")
    edit_recipe(folder, **changes)
    with pytest.raises(BundleError, match="recipe cannot be read"):
        whole.verify_bundle(folder, open_checkpoint(MINIATURE))


@pytest.mark.usefixtures("_few")
@pytest.mark.parametrize(
    ("change", "places"),
    [
        pytest.param(scales_shifted, {"weights", "KL divergence"}, id="scales"),
        pytest.param(zero_points_shifted, {"weights"}, id="zero points"),
        pytest.param(nibbles_swapped, {"weights", "KL divergence"}, id="nibbles"),
        pytest.param(deepstack_levels_swapped, {"deepstack features"}, id="DeepStack"),
    ],
)
def test_the_first_difference_is_at_the_broken_place(
    lossy: Callable[[str], Path], change: Callable[[Path, str], None], places: set[str]
) -> None:
    """Weights are verified separately: the fp32 copy equals PyTorch even on broken weights."""
    folder = lossy("int4")
    change(folder, "genai")
    report = whole.verify_bundle(folder, open_checkpoint(MINIATURE))
    assert report.first_failure is not None
    assert report.first_failure.place == next(place for place in PLACES if place in places)
    assert places <= failing(report), shown(report)
    if "weights" in places:
        assert failing(report) <= {"weights", *PLACES[PLACES.index("KL divergence") :]}, shown(report)


def test_an_added_case_reaches_the_fp32_copy(
    finished: Callable[[str], Path], reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, terms = finished("int4"), LossLimits("fp32", "cpu", Limits(**LIMITS))  # built before anything is replaced
    (tmp_path / "mine.toml").write_text('[[case]]\nname = "mine"\nprompt = "What?"\nchecks = ["inputs"]\n')
    compared: list[str] = []

    def verify(folder: Path, target: str, copy: Reference, suite: Suite) -> Report:
        assert copy.checkpoint.folder != reference.checkpoint.folder
        compared.extend(case.name for case in suite.cases)
        return Report(target, "", (), {})

    monkeypatch.setattr(whole, "verify", verify)
    monkeypatch.setattr(quantized, "quality_gates", lambda *args: ([], {}))
    compare = whole.comparison(reference.checkpoint, None, tmp_path / "store", [tmp_path / "mine.toml"], terms)
    compare(bundle, "genai")
    assert compared == ["one image", "wide, tall", "text", "mine"]


def test_places_that_cannot_run_here_are_reported(built: Built, reference: Reference, tmp_path: Path) -> None:
    """bf16 for CUDA: the CPU provider has no bf16 MatMul, and there is no CUDA provider."""
    recipe = load_recipe("bf16")
    folder = built(MINIATURE, recipe) / "genai"
    assert recipe.limits is not None
    terms = LossLimits(recipe.precision, recipe.provider, recipe.limits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole, "whole_suite", lambda checkpoint, folder, more=(): SUITE)
        report = whole.comparison(reference.checkpoint, None, tmp_path / "store", terms=terms)(folder, "genai")
    assert {"KL divergence", "generated tokens", "the provider cuda"} <= set(report.not_run)
    assert report.verdict == "partial", shown(report)
    assert "decoder prefill" in {gate.place for gate in report.gates}
    assert {"KL divergence", "perplexity"}.isdisjoint({gate.place for gate in report.gates})
    assert "the provider cuda" in shown(report)


def test_the_worst_matrix_of_each_width_has_a_gate() -> None:
    errors = [
        RoundingError("a", 4.5, 0.1, 0.3),
        RoundingError("b", 4.5, 0.2, 0.2),
        RoundingError("c", 8.5, 0.01, 0.02),
    ]
    limits = Limits(**LIMITS)
    gates = list(weight_gates(errors, replace(limits, weight=0.15)))
    assert [(gate.case.rpartition(": ")[2], gate.measured, gate.limit) for gate in gates] == [
        ("b", 0.2, 0.15),
        ("a", 0.3, 0.3),
        ("c", 0.01, 0.15),
        ("c", 0.02, 0.3),
    ]
    assert [gate.ok for gate in gates] == [False, True, True, True]
    assert list(weight_gates([], limits)) == []
