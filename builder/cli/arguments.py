"""Arguments shared by several commands, as typer's annotated types."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer


def _stage(name: str | None) -> str | None:
    from builder.stages.engine.build import STAGES
    from builder.util.spelling import nearest

    names = [stage.name for stage in STAGES]
    if name is None or name in names:
        return name
    near = nearest(name, names)
    meant = f"; did you mean {near!r}?" if near else ""
    raise typer.BadParameter(f"{name!r} is not a stage; expected one of: {', '.join(names)}{meant}")


def _stages(names: list[str] | None) -> list[str]:
    return [name for name in map(_stage, names or []) if name]


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if not found:
        raise typer.BadParameter(f"{text!r} is not an amount of memory; write 4GB, or 800MB")
    power = " KMGT".index(found[2].upper() or " ")
    return round(float(found[1]) * 1000.0**power)


Checkpoint = Annotated[
    str | None,
    typer.Argument(
        help="A local folder, or a hub id with an optional revision (Org/Name@commit). "
        "Default: the embedded miniature.",
        show_default=False,
    ),
]
RecipeOption = Annotated[str, typer.Option("--recipe", help="Name of a shipped recipe, or a .toml file.")]
Output = Annotated[Path | None, typer.Option(help="Default: outputs/<checkpoint>-<recipe>.", show_default=False)]
Until = Annotated[str | None, typer.Option(help="Stop after this stage.", show_default=False, callback=_stage)]
Force = Annotated[
    list[str] | None,
    typer.Option(
        help="Run this stage, and all that depends on it, even if nothing changed; repeatable.",
        callback=_stages,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print what would be written, downloaded and needed, and whether it fits; build nothing."
    ),
]
Memory = Annotated[
    int | None,
    typer.Option(
        help="Memory limit of verification, e.g. 4GB: what does not fit is compared layer by layer. "
        "Default: all that this process may use.",
        show_default=False,
        parser=_bytes,
        metavar="SIZE",
    ),
]
Rehash = Annotated[bool, typer.Option("--rehash", help="Hash all bytes of a local checkpoint.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Bundle = Annotated[Path, typer.Argument(help="A bundle's folder, as printed by `build`.", show_default=False)]
Cases = Annotated[
    list[Path] | None,
    typer.Option(help="Additional cases: a .toml file, or a folder of them; repeatable."),
]
