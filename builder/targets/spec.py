"""What a consuming runtime asks of its artifacts, as a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from builder.checkpoint.load import Checkpoint
from builder.graph.ports import PACKED_FEATURES, PLAIN_FEATURES, Component
from builder.targets.image_preprocessor import Preprocess, in_onnxruntime

if TYPE_CHECKING:
    from onnx import ModelProto

    from builder.targets.runners.protocol import Player


@dataclass(frozen=True)
class Notes:
    """What a model card says of a runtime.

    Args:
        library: the hub's name for it.
        packages: from PyPI, with which the bundle runs.
        run: lines of a shell that ask it, in the bundle's folder.
        limits: one sentence each.
        code: a program that asks it, in the bundle's folder.
        language: that `code` is in, as Markdown names it.
    """

    library: str
    packages: tuple[str, ...]
    run: tuple[str, ...]
    limits: tuple[str, ...]
    code: str = ""
    language: str = "python"


@dataclass(frozen=True)
class Place:
    """Where a graph and its data lie in a bundle: relative, with `/`, both in one folder."""

    graph: str
    data: str


def by_name(graph: str, recipe: Any) -> Place:
    """Names that are the graph's own, at the top of the folder."""
    return Place(f"{graph}.onnx", f"{graph}.onnx.data")


@dataclass(frozen=True)
class Runtime:
    """
    Args:
        name: the recipe's name of the target.
        opset: the one opset of its graphs.
        domains: operator domains that its graphs may contain.
        packed: DeepStack rides in the hidden axis (`builder.graph.ports.packed_components`); else in ports of its own.
        merges: the embeddings graph takes the picture features and puts them in their place.
        attentions: that its graphs may use, the default first.
        ports: checkpoint → its three graphs.
        module: (checkpoint, upstream model, graph name, fused) → the module to trace.
        passes: (graph name, fused) → names of the passes to run, in order (builder/graph/passes/).
        configs: (checkpoint, recipe, recipe's target) → {file: text} of the configuration beside the graphs; of it,
            pipeline.json and vision_processor.json (builder/targets/config_files.py) are what every bundle has.
        programs: {file: text} of those configs that are programs, by which `check` knows them again.
        play: (folder, asked) → the bundle in its runtime, whose packages are imported inside. Where `asked`, for a user
            who trusts it: programs that lie in it may run, and what is broken fails at once.
        notes: for the model card.
        precisions: that it can be built in.
        wide_ports: inputs and outputs that are float32 in every precision, besides pixel values.
        quantized: whether rules may store its matrices in fewer bits.
        provider: whether its settings start the recipe's execution provider; where not, it is built for `cpu`.
        layout: (graph's role, recipe) → where the graph and its data lie.
        apart: every graph brings all of its data; where not, graphs may share what is the same (tied embeddings).
        further: (checkpoint, recipe) → role → a further graph, without external data
            (builder/targets/image_preprocessor.py has one).
        preprocessor: the image preprocessor's file → it, in the runtime; where the bundle has such a graph.
        levels: of 1/255, by which a pixel of its may be off: more than 0 where the runtime has no float64.
        needs: why it cannot be played on this machine; None where it can.
        versions: of what plays it, for the report.
    """

    name: str
    opset: int
    domains: frozenset[str]
    packed: bool
    merges: bool
    attentions: tuple[Literal["eager", "fused"], ...]
    ports: Callable[[Checkpoint], tuple[Component, ...]]
    module: Callable[[Checkpoint, Any, str, bool], Any]
    passes: Callable[[str, bool], tuple[str, ...]]
    configs: Callable[[Checkpoint, Any, Any], Mapping[str, str]]
    play: Callable[[Path, bool], Player]
    notes: Notes
    precisions: tuple[str, ...] = ("fp32",)
    wide_ports: frozenset[str] = frozenset()
    quantized: bool = False
    provider: bool = False
    layout: Callable[[str, Any], Place] = by_name
    apart: bool = False
    programs: Callable[[], Mapping[str, str]] = dict
    further: Callable[[Checkpoint, Any], Mapping[str, ModelProto]] = lambda checkpoint, recipe: {}
    preprocessor: Callable[[Path], Preprocess] = in_onnxruntime
    levels: float = 0.0
    needs: Callable[[], str | None] = lambda: None
    versions: Callable[[], Mapping[str, str]] = dict

    @property
    def features(self) -> str:
        """The vision encoder's output with the main features."""
        return PACKED_FEATURES if self.packed else PLAIN_FEATURES
