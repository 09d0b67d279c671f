"""The command `sensitivity`, which writes a mixed-precision recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType

from builder.cli.arguments import Checkpoint, Json, RecipeOption
from builder.cli.exit_codes import emit, reported
from builder.util.console_table import console_table, show

if TYPE_CHECKING:
    from builder.quantization.sensitivity import Group, Sensitivity


def sensitivity(
    checkpoint: Checkpoint = None,
    recipe: RecipeOption = "int4",
    budget: Annotated[
        float, typer.Option(min=0, help="Growth of the quantized matrices that is allowed, in percent of their bytes.")
    ] = 2.0,
    positions: Annotated[int, typer.Option(min=1, help="Positions to compare, at least.")] = 512,
    write: Annotated[Path | None, typer.Option(help="Write the recipe to this .toml file.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Measure which 4-bit matrices the output depends on most, and give those 8 bits, within a budget of bytes."""
    with reported(as_json):
        from builder.cli.progress_bars import bars
        from builder.quantization import mixed_precision
        from builder.quantization.rules import resolve
        from builder.quantization.sensitivity import estimate_sensitivities, groups
        from builder.stages.engine.prepare import reference_checkpoint
        from builder.targets.recipe_file import as_toml, load_recipe
        from builder.util.errors import RecipeError
        from builder.util.progress import progress

        if write is not None and (write.suffix != ".toml" or write.exists()):
            raise RecipeError(
                f"{write} cannot become a recipe",
                expected="a new file with the suffix .toml",
                found="a file that is there" if write.exists() else f"the suffix {write.suffix!r}",
                next="--write another.toml",
            )
        opened, base = reference_checkpoint(checkpoint), load_recipe(recipe)
        count = len(groups(opened, resolve(base.rules, opened.tensors)))
        with bars(), progress("sensitivity, groups", count) as advance:
            found = estimate_sensitivities(opened, base.rules, positions, advance)
        whole = mixed_precision.stored_bytes(opened, base.rules)
        taken = mixed_precision.choose_groups(found, round(whole * budget / 100))
        text = as_toml(
            replace(base, rules=mixed_precision.with_more_bits(opened, base.rules, taken)),
            f"{base.name}, with 8 bits where {opened.name} is most sensitive: {budget:g} % of bytes more at most.",
        )
        if write is not None:
            write.write_text(text, encoding="utf-8", newline="\n")
        if as_json:
            emit(
                {
                    "ok": True,
                    "bytes": whole,
                    "recipe": text,
                    "groups": [_facts(sensitivity, taken) for sensitivity in found],
                }
            )
            return
        show(_table(found, taken, whole))
        print(text if write is None else write)


def _facts(sensitivity: Sensitivity, taken: Sequence[Group]) -> dict[str, object]:
    return {
        "group": sensitivity.group.name,
        "tensors": list(sensitivity.group.tensors),
        "kl": sensitivity.kl,
        "more bytes": sensitivity.group.extra_bytes,
        "8 bits": sensitivity.group in taken,
    }


def _table(found: Sequence[Sensitivity], taken: Sequence[Group], whole: int) -> RenderableType:
    total = sum(sensitivity.kl for sensitivity in found) or 1.0
    rows = (
        (
            sensitivity.group.name,
            f"{sensitivity.kl:.2e}",
            f"{sensitivity.kl / total:.0%}",
            f"{sensitivity.group.extra_bytes / whole:.1%}",
            "8 bits" if sensitivity.group in taken else "",
        )
        for sensitivity in found
    )
    headings = ("group", "KL, mean", "share", "more bytes", "chosen")
    return console_table("Rounded alone, against PyTorch in fp32", headings, rows, right=headings[1:4])
