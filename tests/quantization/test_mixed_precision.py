"""mixed_precision: the groups chosen for 8 bits, and the recipe with rules for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from builder.checkpoint.load import Checkpoint, open_checkpoint
from builder.checkpoint.tensors import EMBEDDINGS
from builder.quantization.mixed_precision import choose_groups, stored_bytes, with_more_bits
from builder.quantization.rules import Rule, resolve
from builder.quantization.sensitivity import Group, Sensitivity, groups
from builder.targets.recipe_file import as_toml, load_recipe, shipped
from tests.helpers.checkpoints import MINIATURE

LAYER = "model.language_model.layers.2."


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(MINIATURE)


def sensitivity(name: str, kl: float, more: int) -> Sensitivity:
    return Sensitivity(Group((name,), more), kl)


def test_groups_are_chosen_by_gain_per_byte_within_the_budget() -> None:
    found = [sensitivity("large", 9.0, 900), sensitivity("small", 1.0, 10), sensitivity("middle", 2.0, 100)]
    assert [group.tensors[0] for group in choose_groups(found, 120)] == ["small", "middle"]
    assert [group.tensors[0] for group in choose_groups(found, 105)] == ["small"]
    assert [group.tensors[0] for group in choose_groups(found, 1010)] == ["small", "middle", "large"]
    assert choose_groups(found, 9) == []


def test_matrices_of_one_matmul_are_a_group(checkpoint: Checkpoint) -> None:
    weight_formats = resolve(load_recipe("int4-fast").rules, checkpoint.tensors)
    found = {group.name: group for group in groups(checkpoint, weight_formats)}
    query = found[f"{LAYER}self_attn.q_proj+k_proj+v_proj"]
    assert query.tensors == tuple(f"{LAYER}self_attn.{module}_proj.weight" for module in "qkv")
    rows = sum(checkpoint.tensors[name].shape[0] for name in query.tensors)
    assert query.extra_bytes == rows * checkpoint.text.hidden // 2
    assert f"{LAYER}mlp.gate_proj+up_proj" in found
    assert f"{LAYER}mlp.down_proj" in found
    assert EMBEDDINGS.removesuffix(".weight") in found
    assert not any("visual" in name or "layers.0.self_attn.q" in name for name in found)  # of 8 bits already


def test_a_block_of_the_vision_encoder_is_one_group(checkpoint: Checkpoint) -> None:
    weight_formats = resolve([Rule(("model.visual.*",), "int4", 16)], checkpoint.tensors)
    (block,) = [group for group in groups(checkpoint, weight_formats) if group.name == "model.visual.blocks.1"]
    assert {name.rpartition("blocks.1.")[2] for name in block.tensors} == {
        "attn.qkv.weight",
        "attn.proj.weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    }


def test_more_bits_are_rules_in_front_of_the_recipes_own(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = load_recipe("int4")
    more = [Group((f"{LAYER}mlp.down_proj.weight",), 1)]
    path = tmp_path / "mine.toml"
    path.write_text(
        as_toml(replace(base, rules=with_more_bits(checkpoint, base.rules, more)), "int4, and more.\nTwice."),
        encoding="utf-8",
    )
    assert path.read_text(encoding="utf-8").startswith("# int4, and more.\n# Twice.\n")
    recipe = load_recipe(path)
    assert recipe.rules == (Rule((f"{LAYER}mlp.down_proj.weight",), "int8", 64, search="gptq"), *base.rules)
    own, others = resolve(recipe.rules, checkpoint.tensors), resolve(base.rules, checkpoint.tensors)
    assert {name for name in own if own[name] != others[name]} == {f"{LAYER}mlp.down_proj.weight"}


def test_a_rule_that_no_longer_applies_is_removed(checkpoint: Checkpoint) -> None:
    base = load_recipe("int4")
    head = Group((EMBEDDINGS,), 1)
    rules = with_more_bits(checkpoint, base.rules, [head])
    assert len(rules) == len(base.rules)
    assert resolve(rules, checkpoint.tensors)[EMBEDDINGS].blocks.bits == 8


@pytest.mark.parametrize("name", [name for name in shipped() if name.startswith("int")])
def test_every_recipe_reads_as_it_is_written(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "again.toml"
    path.write_text(as_toml(recipe, name), encoding="utf-8")
    assert replace(load_recipe(path), name=name) == recipe


def test_the_bytes_of_a_recipe_are_those_of_its_codes_and_scales(checkpoint: Checkpoint) -> None:
    table = checkpoint.tensors[EMBEDDINGS].shape
    rules = (Rule((EMBEDDINGS,), "int4", 32),)
    assert stored_bytes(checkpoint, rules) == table[0] * table[1] * 5 // 8
