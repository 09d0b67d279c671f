"""The arguments that several commands share, each with its help in one place.

In: what the user wrote. Out: typer's annotated types. Guaranteed: a name that is no stage is a usage error,
with the nearest spelling.
"""

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
    raise typer.BadParameter(f"no stage is called {name!r}; they are: {', '.join(names)}{meant}")


def _stages(names: list[str] | None) -> list[str]:
    return [name for name in map(_stage, names or []) if name]


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if not found:
        raise typer.BadParameter(f"{text!r} is no amount of memory; write 4GB, or 800MB")
    power = " KMGT".index(found[2].upper() or " ")
    return round(float(found[1]) * 1000.0**power)


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
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Say what it would write, download, need and take, and whether it fits; no more."),
]
Memory = Annotated[
    int | None,
    typer.Option(
        help="Memory that verification may use, e.g. 4GB: what does not fit is compared slice by slice. "
        "Default: all that this process may have.",
        show_default=False,
        parser=_bytes,
        metavar="SIZE",
    ),
]
Rehash = Annotated[bool, typer.Option("--rehash", help="Compare a local checkpoint by all its bytes.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Bundle = Annotated[Path, typer.Argument(help="A target's folder, as `build` printed it.", show_default=False)]
Cases = Annotated[
    list[Path] | None,
    typer.Option(help="Cases besides the shipped ones: a .toml file, or a folder of them; repeatable."),
]
