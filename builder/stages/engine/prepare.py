"""Turn a command's arguments into a `Build` or a `Checkpoint`, refusing invalid ones within a second.

Nothing is built or written; a reference checkpoint from the hub is downloaded.
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


def prepared(
    checkpoint: str | None,
    recipe: str,
    output: Path | None,
    *,
    rehash: bool,
    settle_again: bool,
    memory: int | None = None,
) -> Build:
    """Return the build that the arguments of `build` and `explain` describe, with a local checkpoint opened.

    Args:
        checkpoint: a folder or a hub id; None for the embedded miniature.
        recipe: the name of a shipped recipe, or the path of a .toml file.
        output: None for `outputs/<checkpoint>-<recipe>`.
        settle_again: whether an unpinned id is resolved again although an earlier build resolved it.
        memory: see `Build`.

    Raises:
        BuildError: an argument is invalid.
    """
    loaded = load_recipe(recipe)
    requested = _source(checkpoint)
    folder = output or OUTPUTS / f"{requested.name}-{loaded.name}"
    refuse_foreign(folder)
    source = resolve(requested if settle_again else _recorded(requested, folder))
    build = Build(source, loaded, folder, rehash=rehash, memory=memory, requested=str(requested))
    if source.folder is not None:
        _ = build.checkpoint
    return build


def reference_checkpoint(checkpoint: str | None) -> Checkpoint:
    """Open the checkpoint to compare with, downloading it from the hub; None for the embedded miniature.

    Raises:
        BuildError: the checkpoint does not exist or is invalid.
    """
    from builder.checkpoint.hub import download
    from builder.checkpoint.load import open_checkpoint

    source = resolve(_source(checkpoint))
    folder = download(source)[0] if source.folder is None else source.folder
    return open_checkpoint(folder, name=source.name, revision=source.revision)


def _source(checkpoint: str | None) -> Source:
    return replace(parse_source(str(MINIATURE)), name="miniature") if checkpoint is None else parse_source(checkpoint)


def _recorded(requested: Source, output: Path) -> Source:
    """Keep an unpinned hub id at the commit that its output folder was first built from."""
    if requested.repo is None or requested.pinned:
        return requested
    marker = read_marker(output)
    return parse_source(marker["checkpoint"]) if marker and marker.get("asked") == str(requested) else requested
