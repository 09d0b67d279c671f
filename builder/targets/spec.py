"""The contents of a target's bundle besides its three graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from builder.checkpoint.load import Checkpoint
from builder.targets.recipe import Recipe, Target

if TYPE_CHECKING:
    from onnx import ModelProto


@dataclass(frozen=True)
class GraphFiles:
    """Paths of a graph and its data file in a bundle: relative, with `/`, in the same folder."""

    graph: str
    data: str


def by_name(graph: str, recipe: Recipe) -> GraphFiles:
    """Return files at the top of the bundle, named after the graph's role."""
    return GraphFiles(f"{graph}.onnx", f"{graph}.onnx.data")


@dataclass(frozen=True)
class Packaging:
    """The files of a target's bundle.

    Args:
        configs: (checkpoint, recipe, recipe's target) → {file: text} of the files next to the graphs. Every bundle
            includes pipeline.json and vision_processor.json (builder/targets/config_files.py).
        programs: {file: text} of the configs that are programs; `check` recognizes a bundle's programs by them.
        layout: (graph's role, recipe) → paths of the graph and its data file.
        further: (checkpoint, recipe) → {role: additional graph without external data}, such as that of
            builder/targets/image_preprocessor.py.
        provider: whether the settings select the recipe's execution provider; otherwise only `cpu` is allowed.
    """

    configs: Callable[[Checkpoint, Recipe, Target], Mapping[str, str]]
    programs: Callable[[], Mapping[str, str]] = dict
    layout: Callable[[str, Recipe], GraphFiles] = by_name
    further: Callable[[Checkpoint, Recipe], Mapping[str, ModelProto]] = lambda checkpoint, recipe: {}
    provider: bool = False
