"""What a target's bundle holds besides its three graphs, as a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from builder.checkpoint.load import Checkpoint
from builder.targets.recipe import Recipe, Target

if TYPE_CHECKING:
    from onnx import ModelProto


@dataclass(frozen=True)
class Notes:
    """What a model card says about a runtime.

    Args:
        library: the hub's name for it.
        packages: from PyPI, with which the bundle runs.
        run: shell lines that run the bundle, in its folder.
        limits: one sentence each.
        code: a program that runs the bundle, in its folder.
        language: of `code`, as Markdown names it.
    """

    library: str
    packages: tuple[str, ...]
    run: tuple[str, ...]
    limits: tuple[str, ...]
    code: str = ""
    language: str = "python"


@dataclass(frozen=True)
class GraphFiles:
    """Where a graph and its data are in a bundle: relative, with `/`, both in one folder."""

    graph: str
    data: str


def by_name(graph: str, recipe: Recipe) -> GraphFiles:
    """The graph's own name, at the top of the folder."""
    return GraphFiles(f"{graph}.onnx", f"{graph}.onnx.data")


@dataclass(frozen=True)
class Packaging:
    """How a target's bundle is laid out.

    Args:
        configs: (checkpoint, recipe, recipe's target) → {file: text} of the configuration next to the graphs; of it,
            pipeline.json and vision_processor.json (builder/targets/config_files.py) are in every bundle.
        notes: for the model card.
        programs: {file: text} of those configs that are programs, by which `check` recognizes them.
        layout: (graph's role, recipe) → where the graph and its data are.
        further: (checkpoint, recipe) → role → a further graph, without external data
            (builder/targets/image_preprocessor.py has one).
        provider: whether the settings start the recipe's execution provider; where not, the target is built for `cpu`.
    """

    configs: Callable[[Checkpoint, Recipe, Target], Mapping[str, str]]
    notes: Notes
    programs: Callable[[], Mapping[str, str]] = dict
    layout: Callable[[str, Recipe], GraphFiles] = by_name
    further: Callable[[Checkpoint, Recipe], Mapping[str, ModelProto]] = lambda checkpoint, recipe: {}
    provider: bool = False
