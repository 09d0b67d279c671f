"""Estimated sizes of quantized weights, against the layout of the parts that the passes bind."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from builder.checkpoint.load import Checkpoint, open_checkpoint
from builder.checkpoint.safetensors import Tensor
from builder.graph.binding import Binding
from builder.graph.external_data import layout, padded, write_data
from builder.quantization.blockwise import Blocks
from builder.quantization.packing import parts
from builder.quantization.rules import Rule, WeightFormat, resolve
from builder.stages.engine.dry_run import described
from builder.stages.engine.estimate import FP32, ITEMS, Facts, Stored, data_bytes, graph_bytes, stage_cost
from builder.stages.quantize import SCALES
from builder.targets.recipe_file import load_recipe, shipped

SHAPES = ["biased", "untied", "deepstack0", "patch14merge3"]
LAYER = "model.language_model.layers.0."


def of(folder: Path) -> Facts:
    return described(open_checkpoint(folder))


def stored_as(checkpoint: Checkpoint | Facts, precision: str, *rules: Rule) -> Stored:
    return Stored(resolve(rules, checkpoint.tensors), precision)


def side_by_side(name: str) -> str:
    """The common part of a layer's q, k and v names, independent of the estimate's pattern."""
    layer, _, last = name.rpartition("self_attn.")
    if layer and last in {f"{letter}_proj.weight" for letter in "qkv"}:
        return f"{layer} attention"
    layer, _, last = name.rpartition("mlp.")
    if layer and last in {"gate_proj.weight", "up_proj.weight"}:
        return f"{layer} mlp"
    return name


def bindings(tensors: Iterable[Tensor], stored: Stored) -> list[Binding]:
    """Of all tensors, as builder/graph/passes/quantize_weights.py makes them."""
    plain, scales = SCALES[stored.precision], SCALES[stored.precision]
    found = []
    groups: dict[tuple[str, WeightFormat], list[Tensor]] = {}
    for tensor in tensors:
        storage = stored.storages.get(tensor.name)
        if storage is None:
            found.append(Binding(tensor.name, tensor.name, plain, tensor.shape))
        else:
            groups.setdefault((side_by_side(tensor.name), storage), []).append(tensor)
    for (name, storage), members in groups.items():
        shape = sum(tensor.shape[0] for tensor in members), members[0].shape[1]
        for part in parts(storage.blocks):
            dtype = scales if part == "scales" else "uint8"
            below = tuple(tensor.name for tensor in members[1:])
            common = Binding(f"{name}.{part}", members[0].name, dtype, shape, below=below)
            found.append(replace(common, blocks=storage.blocks, part=part))
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", sorted(set(shipped()) - {"fp32-eager"}))
def test_shipped_recipes_have_the_estimated_size(checkpoint: Callable[[str], Path], shape: str, name: str) -> None:
    opened = open_checkpoint(checkpoint(shape))
    recipe = load_recipe(name)
    stored = stored_as(opened, recipe.precision, *recipe.rules)
    placed = layout(bindings(opened.tensors.values(), stored), opened)
    assert data_bytes(opened.tensors.values(), stored) == sum(padded(length) for _, length in placed.values())


@pytest.mark.parametrize("precision", list(ITEMS))
def test_written_files_have_the_estimated_size(
    checkpoint: Callable[[str], Path], tmp_path: Path, precision: str
) -> None:
    opened = open_checkpoint(checkpoint("untied"))
    rules = Rule((f"{LAYER}*",), "int8", 16, zero_points=True), Rule(("*",), "int4", 64, search="none")
    stored = stored_as(opened, precision, *rules)
    path = tmp_path / "data"
    data = write_data({path: bindings(opened.tensors.values(), stored)}, opened).files[path]
    assert path.stat().st_size == data.size == data_bytes(opened.tensors.values(), stored)


@pytest.mark.parametrize("precision", list(ITEMS))
def test_a_matrix_by_hand(precision: str) -> None:
    tensor = Tensor(f"{LAYER}mlp.down_proj.weight", "f", "F32", (1000, 256), 0, 0)
    item = ITEMS[precision]
    storages = {tensor.name: WeightFormat(Blocks(4, 32, zero_points=True), 4)}
    levels, scales, zeros = 1000 * 256 // 2, 1000 * 8 * item, 1000 * 8 // 2
    estimated = data_bytes([tensor], Stored(storages, precision))
    assert estimated == padded(levels) + padded(scales) + padded(zeros)
    assert data_bytes([tensor], Stored({}, precision)) == padded(1000 * 256 * item)


def test_members_of_one_product_share_their_pages() -> None:
    """Three matrices share just over a page; they are separate where their formats differ."""
    tensors = [Tensor(f"{LAYER}self_attn.{letter}_proj.weight", "f", "F32", (40, 64), 0, 0) for letter in "qkv"]
    same, other = WeightFormat(Blocks(4, 64), 4), WeightFormat(Blocks(8, 64), 4)
    together = data_bytes(tensors, Stored({tensor.name: same for tensor in tensors}))
    assert together == padded(3 * 40 * 32) + padded(3 * 40 * 4)
    apart = data_bytes(tensors, Stored({tensor.name: other if ".q_" in tensor.name else same for tensor in tensors}))
    assert apart == padded(2 * 40 * 32) + padded(2 * 40 * 4) + padded(40 * 64) + padded(40 * 4)


def test_only_fp32_without_rules_is_exact_and_gptq_is_calibrated(miniature: Path) -> None:
    facts = of(miniature)
    assert FP32.exact
    assert not Stored({}, "fp16").exact
    fast, calibrated = (stored_as(facts, "fp32", *load_recipe(name).rules) for name in ("int4-fast", "int4"))
    assert (fast.exact, fast.calibrated) == (False, False)
    assert (calibrated.exact, calibrated.calibrated) == (False, True)


def test_fewer_bits_are_fewer_bytes_and_calibration_takes_longer(miniature: Path) -> None:
    facts = of(miniature)
    costs = {}
    recipes = {name: load_recipe(name) for name in ("fp32", "fp16", "int8", "int4", "int4-fast")}
    searched = tuple(replace(rule, search="mse") for rule in recipes["int4"].rules)
    for name, recipe in {**recipes, "int4, searched": replace(recipes["int4"], rules=searched)}.items():
        stored = stored_as(facts, recipe.precision, *recipe.rules)
        costs[name] = stage_cost("quantize", facts, ["genai"], "whole", stored)
        estimated = sum(row.data_bytes for row in graph_bytes(facts, ["genai"], stored))
        assert estimated < costs[name].written
    written = [costs[name].written for name in recipes]
    assert written == sorted(written, reverse=True)
    assert costs["int4"].written == costs["int4, searched"].written
    assert costs["int4"].seconds > costs["int4, searched"].seconds > costs["fp32"].seconds
    assert costs["int4"].memory > costs["int4, searched"].memory


def test_an_inexact_build_writes_an_fp32_copy(miniature: Path) -> None:
    facts = of(miniature)
    exact, half = (stage_cost("verify", facts, ["genai"], "whole", stored) for stored in (FP32, Stored({}, "fp16")))
    assert half.written - exact.written == 4 * sum(tensor.nbytes for tensor in facts.tensors.values()) // 2
