"""Test quality measurements: no loss for an exact copy, and each figure grows with broken weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from builder.bundle.dequantize import write_dequantized
from builder.checkpoint.load import open_checkpoint
from builder.checkpoint.parts import DECODER
from builder.reference.cases import Case, Suite, held_out, shipped_cases
from builder.reference.model import Reference
from builder.targets.recipe import Limits
from builder.targets.recipe_file import load_recipe
from builder.util.statistics import log_softmax
from builder.verify.graphs.fp32_copy import write_fp32_copy
from builder.verify.quality import PROSE, CaseQuality, joined, quality_gates
from builder.verify.report.gates import PLACES, Gate
from builder.verify.self_test.edits import edited, numbers
from tests.helpers.checkpoints import MINIATURE

pytestmark = pytest.mark.torch

QUALITY = PLACES[PLACES.index("KL divergence") :]
NO_LOSS = Limits(weight=1e-9, kl_mean=1e-8, kl_p99=1e-7, same_top=1.0, perplexity=1.0001, task_lost=0, lead=1e-3)


def suite() -> Suite:
    cases = tuple(case for case in shipped_cases() if case.name in ("text", "one image"))
    return Suite(cases, held_out(open_checkpoint(MINIATURE))[:8])


def limits(recipe: str) -> Limits:
    allowed = load_recipe(recipe).limits
    assert allowed is not None
    return allowed


def measured(folder: Path, reference: Reference, allowed: Limits) -> tuple[list[Gate], dict[str, Any]]:
    return quality_gates(folder, "genai", reference, allowed, suite())


def test_nothing_is_lost_against_its_own_weights(finished: Callable[[str], Path], tmp_path: Path) -> None:
    """The fp32 copy equals PyTorch on the bundle's own weights."""
    write_fp32_copy(finished("int4"), tmp_path / "fp32_copy")
    write_dequantized(finished("int4"), open_checkpoint(MINIATURE), "fp32", tmp_path / "own")
    gates, facts = measured(tmp_path / "fp32_copy", Reference(open_checkpoint(tmp_path / "own")), NO_LOSS)
    assert all(gate.ok for gate in gates), gates
    assert [place for place in PLACES if place in {gate.place for gate in gates}] == list(QUALITY)
    assert facts["positions"]["same top-1"] == 1
    assert facts["positions"]["positions"] > 200
    assert max(facts["drift"]) < 1e-4
    assert facts["largest lead"] < 1e-3
    assert facts["task"]["lost"] == 0
    assert facts["task"]["PyTorch"] == facts["task"]["ONNX"]


def scaled(folder: Path, **factors: float) -> None:
    """Multiply the scales of each matrix whose name contains a key by its factor."""
    with edited(folder, DECODER) as graph:
        for name, value in graph.initializers.items():
            for part, factor in factors.items():
                if name.endswith(".scales") and part in name.replace(".", "_"):
                    value.const_value = ir.tensor(numbers(value) * np.float32(factor), name=name)


def failed_places(gates: list[Gate]) -> set[str]:
    return {gate.place for gate in gates if not gate.ok}


def test_the_recipe_passes_and_one_layer_fails_the_distribution(
    lossy: Callable[[str], Path], reference: Reference
) -> None:
    folder = lossy("int4")
    gates, before = measured(folder, reference, limits("int4"))
    assert failed_places(gates) == set(), gates
    scaled(folder, layers_2_=1.3)
    gates, after = measured(folder, reference, limits("int4"))
    assert {"KL divergence", "top-1 disagreement"} <= failed_places(gates), gates
    assert after["positions"]["kl mean"] > 2 * before["positions"]["kl mean"]
    # Layers before it are unchanged.
    assert after["drift"][1] == pytest.approx(before["drift"][1], rel=0.5)
    assert after["drift"][2] > 2 * before["drift"][2]


def test_an_overconfident_head_fails_the_perplexity(lossy: Callable[[str], Path], reference: Reference) -> None:
    """Its top-1 tokens are correct, so only gates on probabilities can catch it."""
    folder = lossy("int4")
    scaled(folder, lm_head=2.0)
    gates, _ = measured(folder, reference, limits("int4"))
    assert failed_places(gates) == {"KL divergence", "perplexity"}, gates


def test_zeroed_layers_fail_the_generated_tokens(lossy: Callable[[str], Path], reference: Reference) -> None:
    folder = lossy("int4")
    scaled(folder, layers_1_=0.0, layers_2_=0.0, layers_3_=0.0)
    gates, facts = measured(folder, reference, limits("int4"))
    assert failed_places(gates) >= {"KL divergence", "top-1 disagreement", "generated tokens", "held-out accuracy"}, (
        gates
    )
    assert all(gate.detail for gate in gates if gate.place in ("generated tokens", "held-out accuracy"))
    assert facts["task"]["lost"] > 1
    assert facts["largest lead"] > 3


def test_log_softmax_equals_torchs_and_handles_large_logits() -> None:
    logits = np.random.default_rng(0).standard_normal((5, 97)).astype(np.float32) * 30
    want = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    np.testing.assert_allclose(log_softmax(logits), want, atol=1e-12)
    assert log_softmax(logits).dtype == np.float64
    large = log_softmax(np.array([[1e4, 0, -1e4]], np.float16))
    np.testing.assert_array_equal(large, [[0, -1e4, -2e4]])


def test_figures_weigh_all_positions_equally() -> None:
    """A case counts once per position."""
    case = Case("any", "", ())
    one = CaseQuality(case, (1,), np.array([1.0]), np.array([False]), [0.0], 0.0, "")
    many = replace(one, kl=np.zeros(199), same=np.ones(199, bool))
    assert joined([one, many]) == {
        "positions": 200,
        "kl mean": pytest.approx(0.005),
        "kl p99": pytest.approx(0),
        "kl max": 1.0,
        "same top-1": pytest.approx(0.995),
    }


def test_the_text_of_the_perplexity_is_shipped() -> None:
    text = PROSE.read_text(encoding="utf-8")
    assert len(text.split()) > 300
    assert text.isascii()
    assert PROSE.is_relative_to(Path(__file__).parents[2] / "builder" / "suite")
