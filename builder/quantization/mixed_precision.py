"""8 bits for the groups whose bytes save most, as a recipe.

In: sensitivities (builder/quantization/sensitivity.py), a recipe and a budget of bytes. Out: the recipe with rules in
front, and its text. Guaranteed: what is written is what `load_recipe` reads; no rule of it is idle.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace

from builder.checkpoint.load import Checkpoint
from builder.quantization.rules import Rule, matrices, resolve
from builder.quantization.sensitivity import Group, Sensitivity
from builder.targets.recipe_file import Recipe


def chosen(sensitivities: Sequence[Sensitivity], budget: int) -> list[Group]:
    """Groups for 8 bits, those whose bytes save most first, as long as `budget` bytes last."""
    taken, left = [], budget
    for one in sorted(sensitivities, key=lambda one: -one.per_byte):
        if one.group.more <= left:
            taken.append(one.group)
            left -= one.group.more
    return taken


def stored_bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Of all matrices that the recipe quantizes, with their scales."""
    storages = resolve(recipe.rules, checkpoint.tensors)
    bits = sum(math.prod(checkpoint.tensors[name].shape) * one.blocks.bits_per_weight for name, one in storages.items())
    return round(bits / 8)


def with_more_bits(checkpoint: Checkpoint, recipe: Recipe, more: Sequence[Group]) -> Recipe:
    """The recipe, its first rules storing these groups in 8 bits; all else of them as it was."""
    first = []
    for group in more:
        rule = next(rule for rule in recipe.rules if rule.matches(group.tensors[0]))
        first.append(replace(rule, weights=group.tensors, store="int8"))
    rules = (*first, *recipe.rules)
    used = {next(n for n, rule in enumerate(rules) if rule.matches(name)) for name in _decided(checkpoint, rules)}
    return replace(recipe, rules=tuple(rule for number, rule in enumerate(rules) if number in used))


def as_toml(recipe: Recipe, remark: str) -> str:
    """The recipe as a file that `load_recipe` reads; `remark` is its first comment."""
    targets = [target.runtime for target in recipe.targets]
    lines = [f"# {line}" for line in remark.splitlines()]
    lines += [f"{key} = {json.dumps(getattr(recipe, key))}" for key in ("precision", "provider", "max_length")]
    lines.append(f"targets = {json.dumps(targets)}")
    defaults = {one.name: one.default for one in fields(Rule)}
    for rule in recipe.rules:
        set_here = {key: value for key, value in asdict(rule).items() if value != defaults[key]}
        lines += ["", "[[rules]]", *(f"{key} = {json.dumps(value)}" for key, value in set_here.items())]
    if recipe.limits is not None:
        lines += ["", "[limits]", *(f"{key} = {json.dumps(value)}" for key, value in asdict(recipe.limits).items())]
    return "\n".join(lines) + "\n"


def _decided(checkpoint: Checkpoint, rules: Sequence[Rule]) -> Iterator[str]:
    """Tensors that a rule names, as `resolve` sees them."""
    for name in matrices(checkpoint.tensors):
        if any(rule.matches(name) for rule in rules):
            yield name
