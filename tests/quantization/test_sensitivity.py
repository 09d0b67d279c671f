"""sensitivity: the cost of rounding a single group, against the full model in memory with those weights rounded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from builder.checkpoint.load import open_checkpoint
from builder.checkpoint.tensors import EMBEDDINGS
from builder.cli.app import app
from builder.quantization import sensitivity
from builder.quantization.blockwise import dequantize, quantize
from builder.quantization.calibrate import calibration_prompts
from builder.quantization.rules import Rule, resolve
from builder.quantization.sensitivity import estimate_sensitivities
from builder.reference.model import Reference
from builder.targets.recipe import Recipe
from builder.targets.recipe_file import load_recipe
from builder.util.errors import RecipeError
from builder.util.statistics import log_softmax
from tests.helpers.checkpoints import MINIATURE
from tests.helpers.random_models import Array

pytestmark = pytest.mark.torch

LAYER, BLOCK = "model.language_model.layers.1.mlp.", "model.visual.blocks.2."
RULES = (
    Rule((f"{LAYER}gate_proj.weight", f"{LAYER}up_proj.weight"), "int4"),
    Rule((EMBEDDINGS,), "int4"),
    Rule((f"{BLOCK}*",), "int4", 16, zero_points=True),
)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return replace(load_recipe("int4"), rules=RULES)


def prompts(reference: Reference) -> list[tuple[Any, Any]]:
    """The two shortest prompts with an image, and the shortest without."""
    found = sorted(calibration_prompts(reference, reference.checkpoint), key=lambda case: case[0].input_ids.size)
    with_image = [case for case in found if case[0].pixel_values is not None]
    return [*with_image[:2], next(case for case in found if case[0].pixel_values is None)]


def by_hand(rules: tuple[Rule, ...]) -> dict[str, float]:
    """Group → mean KL divergence, from the full model in memory with the group's weights replaced."""
    checkpoint = open_checkpoint(MINIATURE)
    reference = Reference(checkpoint)
    torch, weight_formats = reference.torch, resolve(rules, checkpoint.tensors)
    cases = prompts(reference)
    exact = [answers(reference, *case) for case in cases]
    parameters = dict(reference.model.named_parameters())
    found = {}
    for group in sensitivity.groups(checkpoint, weight_formats):
        kept = {name: parameters[name].detach().clone() for name in group.tensors}
        with torch.no_grad():
            for name, rows in kept.items():
                blocks = replace(weight_formats[name].blocks, search="mse")
                parameters[name].copy_(torch.from_numpy(dequantize(quantize(rows.numpy(), blocks))))
            got = [answers(reference, *case) for case in cases]
            for name, rows in kept.items():
                parameters[name].copy_(rows)
        kl = [(np.exp(p) * (p - q)).sum(1) for p, q in zip(exact, got, strict=True)]
        found[group.name] = float(np.concatenate(kl).mean())
    return found


def answers(reference: Reference, prompt: Any, answer: Any) -> Array:
    """Log-probabilities of every position after the last image."""
    ids = np.concatenate([prompt.input_ids[0], answer])
    images = np.flatnonzero(ids == reference.image_token_id)
    begin = images[-1] + 1 if len(images) else 0
    return log_softmax(reference.logits(prompt, answer)[int(begin) :])


def test_each_group_costs_the_same_in_the_full_model(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "calibration_prompts", lambda reference, _: iter(prompts(reference)))
    done: list[int] = []
    found = estimate_sensitivities(open_checkpoint(MINIATURE), recipe.rules, 10**6, lambda: done.append(1))
    want = by_hand(RULES)
    assert len(done) == len(found) == len(want) == 3
    assert [each.kl for each in found] == sorted((each.kl for each in found), reverse=True)
    for each in found:
        assert each.kl == pytest.approx(want[each.group.name], rel=1e-3), each.group.name
        assert each.kl > 1e-6, each.group.name


def test_a_recipe_without_4_bits_is_refused(recipe: Recipe) -> None:
    with pytest.raises(RecipeError) as caught:
        estimate_sensitivities(open_checkpoint(MINIATURE), load_recipe("int8").rules, 10)
    assert "stores nothing in 4 bits" in caught.value.what
    assert "matrices in 8 bits" in str(caught.value.found)


def test_the_command_writes_a_recipe_and_reports_the_measurements(tmp_path: Path) -> None:
    base, path = tmp_path / "base.toml", tmp_path / "mine.toml"
    rules = "".join(
        f'[[rules]]\nweights = ["{LAYER}{name}.weight"]\nstore = "int4"\n' for name in ("gate_proj", "down_proj")
    )
    base.write_text('like = "int4"\n' + rules, encoding="utf-8")
    arguments = ["sensitivity", str(MINIATURE), "--recipe", str(base), "--positions", "1", "--budget", "45"]
    result = CliRunner().invoke(app, [*arguments, "--write", str(path), "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert {group["group"]: group["8 bits"] for group in facts["groups"]} == {
        f"{LAYER}gate_proj": facts["groups"][0]["group"].endswith("gate_proj"),
        f"{LAYER}down_proj": facts["groups"][0]["group"].endswith("down_proj"),
    }
    assert path.read_text(encoding="utf-8") == facts["recipe"]
    assert [rule.store for rule in load_recipe(path).rules] == ["int8", "int4"]

    again = CliRunner().invoke(app, [*arguments, "--write", str(path)])
    assert again.exit_code != 0
    assert "a file that is there" in again.output
