"""Choose the groups of matrices that get 8 bits within a budget of bytes, and add rules for them to a recipe."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from builder.checkpoint.load import Checkpoint
from builder.quantization.rules import Rule, matrices, resolve
from builder.quantization.sensitivity import Group, Sensitivity


def choose_groups(sensitivities: Sequence[Sensitivity], budget: int) -> list[Group]:
    """The groups that get 8 bits: most sensitive per byte first, as long as they fit into `budget` bytes."""
    chosen, left = [], budget
    for sensitivity in sorted(sensitivities, key=lambda each: -each.per_byte):
        if sensitivity.group.extra_bytes <= left:
            chosen.append(sensitivity.group)
            left -= sensitivity.group.extra_bytes
    return chosen


def stored_bytes(checkpoint: Checkpoint, rules: Sequence[Rule]) -> int:
    """Size in bytes of all matrices that the rules quantize, scales included."""
    weight_formats = resolve(rules, checkpoint.tensors)
    sizes = {name: math.prod(checkpoint.tensors[name].shape) for name in weight_formats}
    return round(sum(sizes[name] * each.blocks.bits_per_weight for name, each in weight_formats.items()) / 8)


def with_more_bits(checkpoint: Checkpoint, rules: Sequence[Rule], more: Sequence[Group]) -> tuple[Rule, ...]:
    """The rules, preceded by rules that store these groups in 8 bits; rules that no longer apply are removed."""
    first = []
    for group in more:
        rule = next(rule for rule in rules if rule.matches(group.tensors[0]))
        first.append(replace(rule, weights=group.tensors, store="int8"))
    every = (*first, *rules)
    used = {next(n for n, rule in enumerate(every) if rule.matches(name)) for name in _decided(checkpoint, every)}
    return tuple(rule for number, rule in enumerate(every) if number in used)


def _decided(checkpoint: Checkpoint, rules: Sequence[Rule]) -> Iterator[str]:
    """The matrices that a rule matches, as in `resolve`."""
    for name in matrices(checkpoint.tensors):
        if any(rule.matches(name) for rule in rules):
            yield name
