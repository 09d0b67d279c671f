"""From a command's arguments to a frozen `Build`, checked as far as one second goes.

In: what the user wrote. Out: a `Build` with its recipe read, its revision settled, its checkpoint's config
and headers checked. Guaranteed: nothing is built yet, and nothing is written.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from builder.checkpoint.fingerprint import resolve
from builder.checkpoint.source import Source, parse_source
from builder.stages.engine.build import Build
from builder.stages.engine.output_folder import read_marker, refuse_foreign
from builder.targets.recipe_file import load_recipe

if TYPE_CHECKING:
    from builder.checkpoint.load import Checkpoint

MINIATURE = Path(__file__).parents[2] / "miniature" / "checkpoint"
OUTPUTS = Path("outputs")


def prepared(checkpoint: str | None, recipe: str, output: Path | None, *, rehash: bool, settle_again: bool) -> Build:
    """The build that the arguments of `build` and `explain` ask for.

    Args:
        checkpoint: a folder or a hub id; None for the embedded miniature.
        recipe: a shipped one's name, or the path of a .toml file.
        output: None for `outputs/<checkpoint>-<recipe>`.
        settle_again: ask the hub which commit an unpinned id means although an earlier build has.

    Raises:
        BuildError: an argument that no build can start from.
    """
    wanted = load_recipe(recipe)
    asked = replace(parse_source(str(MINIATURE)), name="miniature") if checkpoint is None else parse_source(checkpoint)
    folder = output or OUTPUTS / f"{asked.name}-{wanted.name}"
    refuse_foreign(folder)
    source = _checked(asked if settle_again else _recorded(asked, folder))
    return Build(source, wanted, folder, rehash=rehash, asked=str(asked))


def reference_folder(checkpoint: str) -> Path:
    """A checkpoint to compare with, on this disk; downloaded when it is the hub's.

    Raises:
        BuildError: no such checkpoint.
    """
    source = _checked(parse_source(checkpoint))
    if source.folder is not None:
        return source.folder
    from builder.checkpoint.hub import download

    return download(source)[0]


def reference_checkpoint(checkpoint: str | None) -> Checkpoint:
    """The same, opened under its own name and revision; None for the embedded miniature.

    Raises:
        BuildError: no such checkpoint.
    """
    from builder.checkpoint.load import open_checkpoint

    if checkpoint is None:
        return open_checkpoint(MINIATURE, name="miniature")
    source = resolve(parse_source(checkpoint))
    return open_checkpoint(reference_folder(str(source)), name=source.name, revision=source.revision)


def _recorded(asked: Source, output: Path) -> Source:
    """An unpinned hub id stays the commit that it was when its output folder was first built."""
    if asked.repo is None or asked.pinned:
        return asked
    marker = read_marker(output)
    return parse_source(marker["checkpoint"]) if marker and marker.get("asked") == str(asked) else asked


def _checked(source: Source) -> Source:
    settled = resolve(source)
    if settled.folder is not None:
        from builder.checkpoint.load import open_checkpoint

        open_checkpoint(settled.folder, name=settled.name)
    return settled
