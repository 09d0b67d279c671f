"""What a recipe asks for and no runtime could run.

In: a recipe whose every key has its type. Out: nothing, or a `RecipeError` before any work.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from builder.errors import RecipeError
from builder.providers import check_provider

if TYPE_CHECKING:
    from builder.recipe import Recipe


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
    plain = [target.runtime for target in recipe.targets if target.runtime == "onnxruntime"]
    if recipe.rules and plain:
        raise RecipeError(
            f"recipe {path}: `rules` cannot be carried out for the target `onnxruntime`",
            expected='targets = ["genai"]: the operators for quantized blocks are no standard ones',
            found=", ".join(target.runtime for target in recipe.targets),
            next='remove "onnxruntime" from `targets`, or `rules`',
        )
    if plain and (recipe.provider != "cpu" or recipe.precision != "fp32"):
        raise RecipeError(
            f"recipe {path}: the target `onnxruntime` is built in fp32, and its runtime chooses the provider",
            expected='provider = "cpu", precision = "fp32"',
            found=f"{recipe.provider}, {recipe.precision}",
            next='targets = ["genai"]',
        )
    if not recipe.exact and any(target.attention == "eager" for target in recipe.targets):
        raise RecipeError(
            f"recipe {path}: eager attention is built in fp32 only",
            expected="fused",
            found="eager",
            next="remove `attention`",
        )
