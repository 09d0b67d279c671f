"""What a recipe asks for and no runtime could run.

In: a recipe whose every key has its type. Out: nothing, or a `RecipeError` before any work.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from builder.targets.graphs import GRAPHS
from builder.targets.providers import check_provider
from builder.targets.registry import PACKAGING
from builder.util.errors import RecipeError

if TYPE_CHECKING:
    from builder.targets.recipe import Recipe


def check_runnable(path: Path, recipe: Recipe) -> None:
    """
    Raises:
        RecipeError: limits that are missing or superfluous; a precision, rules or a provider that a target cannot have.
    """
    check_provider(recipe.provider, recipe.precision, recipe.rules, path)
    for rule in recipe.rules:
        if rule.activations == "int8" and (rule.store != "int8" or rule.zero_points or rule.search == "gptq"):
            raise RecipeError(
                f"recipe {path}: 8-bit activations are multiplied with 8-bit weights of one scale a row",
                expected='store = "int8", no zero points, search = "none" or "mse"',
                found=f"store = {rule.store!r}, zero_points = {rule.zero_points}, search = {rule.search!r}",
                next="remove `activations`, or change the others",
            )
    if recipe.exact != (recipe.limits is None):
        raise RecipeError(
            f"recipe {path}: " + ("`limits` is for what may lose" if recipe.exact else "`limits` is missing"),
            expected="no `limits`: fp32 equals the model" if recipe.exact else "what this build may lose, as a table",
            found="limits" if recipe.exact else "none",
            next="remove `limits`" if recipe.exact else "take those of a shipped recipe, or measure and set your own",
        )
    names = [target.runtime for target in recipe.targets]
    exact = [name for name in names if not GRAPHS[name].quantized]
    if recipe.rules and exact:
        raise RecipeError(
            f"recipe {path}: `rules` cannot be carried out for the target `{exact[0]}`",
            expected=f"{_able(lambda name: GRAPHS[name].quantized)}: "
            "the operators for quantized blocks are not standard ones",
            found=", ".join(names),
            next=f'remove "{exact[0]}" from `targets`, or `rules`',
        )
    for name in names:
        precisions, chooses = GRAPHS[name].precisions, PACKAGING[name].provider
        if recipe.precision not in precisions or (recipe.provider != "cpu" and not chooses):
            provider = "" if chooses else ", and its runtime chooses the provider"
            raise RecipeError(
                f"recipe {path}: the target `{name}` is built in {' or '.join(precisions)}{provider}",
                expected=f'provider = "cpu", precision = "{precisions[0]}"',
                found=f"{recipe.provider}, {recipe.precision}",
                next=_able(lambda name: recipe.precision in GRAPHS[name].precisions and PACKAGING[name].provider),
            )
    either = [target for target in recipe.targets if len(GRAPHS[target.runtime].attentions) > 1]
    if not recipe.exact and any(target.attention == "eager" for target in either):
        raise RecipeError(
            f"recipe {path}: eager attention is built in fp32 only",
            expected="fused",
            found="eager",
            next="remove `attention`",
        )


def _able(may: Callable[[str], bool]) -> str:
    """The line of a recipe with every target that may."""
    names = ", ".join(f'"{name}"' for name in GRAPHS if may(name))
    return f"targets = [{names}]"
