"""The arguments that several commands share, each with its help in one place.

In: what the user wrote. Out: typer's annotated types. Guaranteed: a name that is no stage is a usage error,
with the nearest spelling.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def _stage(name: str | None) -> str | None:
    from builder.recipe import nearest
    from builder.stage import STAGES

    names = [stage.name for stage in STAGES]
    if name is None or name in names:
        return name
    near = nearest(name, names)
    meant = f"; did you mean {near!r}?" if near else ""
    raise typer.BadParameter(f"no stage is called {name!r}; they are: {', '.join(names)}{meant}")


def _stages(names: list[str] | None) -> list[str]:
    return [name for name in map(_stage, names or []) if name]


Checkpoint = Annotated[
    str | None,
    typer.Argument(
        help="A local folder, or a hub id with an optional revision (Org/Name@commit). "
        "Without one: the embedded miniature.",
        show_default=False,
    ),
]
RecipeOption = Annotated[str, typer.Option("--recipe", help="A shipped recipe's name, or a .toml file.")]
Output = Annotated[Path | None, typer.Option(help="Default: outputs/<checkpoint>-<recipe>.", show_default=False)]
Until = Annotated[str | None, typer.Option(help="The last stage to build.", show_default=False, callback=_stage)]
Force = Annotated[
    list[str] | None,
    typer.Option(
        help="Run this stage, and what is made from it, although nothing changed; repeatable.",
        callback=_stages,
    ),
]
Rehash = Annotated[bool, typer.Option("--rehash", help="Compare a local checkpoint by all its bytes.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Bundle = Annotated[Path, typer.Argument(help="A target's folder, as `build` printed it.", show_default=False)]
