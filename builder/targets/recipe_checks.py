"""What a recipe asks for and no runtime could run.

In: a recipe whose every key has its type. Out: nothing, or a `RecipeError` before any work.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from builder.targets.providers import check_provider
from builder.targets.registry import TARGETS
from builder.util.errors import RecipeError

if TYPE_CHECKING:
    from builder.targets.recipe_file import Recipe
    from builder.targets.spec import Runtime


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
    runtimes = [TARGETS[target.runtime] for target in recipe.targets]
    exact = [one.name for one in runtimes if not one.quantized]
    if recipe.rules and exact:
        raise RecipeError(
            f"recipe {path}: `rules` cannot be carried out for the target `{exact[0]}`",
            expected=f"{_able(lambda one: one.quantized)}: the operators for quantized blocks are no standard ones",
            found=", ".join(one.name for one in runtimes),
            next=f'remove "{exact[0]}" from `targets`, or `rules`',
        )
    for one in runtimes:
        if recipe.precision not in one.precisions or (recipe.provider != "cpu" and not one.provider):
            provider = "" if one.provider else ", and its runtime chooses the provider"
            raise RecipeError(
                f"recipe {path}: the target `{one.name}` is built in {' or '.join(one.precisions)}{provider}",
                expected=f'provider = "cpu", precision = "{one.precisions[0]}"',
                found=f"{recipe.provider}, {recipe.precision}",
                next=_able(lambda one: recipe.precision in one.precisions and one.provider),
            )
    either = [one for one in recipe.targets if len(TARGETS[one.runtime].attentions) > 1]
    if not recipe.exact and any(target.attention == "eager" for target in either):
        raise RecipeError(
            f"recipe {path}: eager attention is built in fp32 only",
            expected="fused",
            found="eager",
            next="remove `attention`",
        )


def _able(may: Callable[[Runtime], bool]) -> str:
    """The line of a recipe with every target that may."""
    names = ", ".join(f'"{one.name}"' for one in TARGETS.values() if may(one))
    return f"targets = [{names}]"
