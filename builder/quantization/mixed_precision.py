"""8 bits for the groups whose bytes save most, as a recipe.

In: sensitivities (builder/quantization/sensitivity.py), a recipe and a budget of bytes. Out: the recipe with rules in
front, and its text. Guaranteed: what is written is what `load_recipe` reads; no rule of it is idle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from builder.checkpoint.load import Checkpoint
from builder.quantization.rules import Rule, matrices, resolve
from builder.quantization.sensitivity import Group, Sensitivity


def choose_groups(sensitivities: Sequence[Sensitivity], budget: int) -> list[Group]:
    """Groups for 8 bits, those whose bytes save most first, as long as `budget` bytes last."""
    taken, left = [], budget
    for one in sorted(sensitivities, key=lambda one: -one.per_byte):
        if one.group.more <= left:
            taken.append(one.group)
            left -= one.group.more
    return taken


def stored_bytes(checkpoint: Checkpoint, rules: Sequence[Rule]) -> int:
    """Of all matrices that the rules quantize, with their scales."""
    storages = resolve(rules, checkpoint.tensors)
    bits = sum(math.prod(checkpoint.tensors[name].shape) * one.blocks.bits_per_weight for name, one in storages.items())
    return round(bits / 8)


def with_more_bits(checkpoint: Checkpoint, rules: Sequence[Rule], more: Sequence[Group]) -> tuple[Rule, ...]:
    """The rules, the first of them storing these groups in 8 bits; all else of them as it was."""
    first = []
    for group in more:
        rule = next(rule for rule in rules if rule.matches(group.tensors[0]))
        first.append(replace(rule, weights=group.tensors, store="int8"))
    every = (*first, *rules)
    used = {next(n for n, rule in enumerate(every) if rule.matches(name)) for name in _decided(checkpoint, every)}
    return tuple(rule for number, rule in enumerate(every) if number in used)


def _decided(checkpoint: Checkpoint, rules: Sequence[Rule]) -> Iterator[str]:
    """Tensors that a rule names, as `resolve` sees them."""
    for name in matrices(checkpoint.tensors):
        if any(rule.matches(name) for rule in rules):
            yield name
