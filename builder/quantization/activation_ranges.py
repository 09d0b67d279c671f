"""Measure the largest activation in each layer, to choose the layers that stay fp32 in a fp16 build.

The output of every module in a layer is measured, and the residual stream after it. Magnitudes on sample inputs are
not an upper bound, so a layer stays fp32 as soon as it exceeds a fraction of fp16's range.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from builder.checkpoint.parts import DECODER, VISION
from builder.reference.cases import suite_cases
from builder.reference.model import Reference

MAGNITUDES = "largest magnitudes"  # key in a report
FP16_MAX = float(np.finfo(np.float16).max)
MARGIN = 4.0  # factor between the largest magnitude measured and the largest of fp16


@dataclass(frozen=True)
class Range:
    """The largest magnitude in a layer of a graph, and the module whose output has it ("" for the layer itself)."""

    graph: str
    layer: int
    magnitude: float
    module: str

    @property
    def wide(self) -> bool:
        """Whether the layer stays fp32."""
        return self.magnitude * MARGIN > FP16_MAX


def activation_ranges(reference: Reference) -> list[Range]:
    """Run PyTorch in fp32 on the suite's cases for this; return a range for each layer."""
    largest: dict[tuple[str, int], tuple[float, str]] = {}

    def note(key: tuple[str, int], name: str) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, out: Any) -> None:
            value = out[0] if isinstance(out, tuple) else out
            if hasattr(value, "abs") and value.numel():
                largest[key] = max(largest.get(key, (0.0, "")), (float(value.abs().max()), name))

        return hook

    visual, text = reference.model.model.visual, reference.model.model.language_model
    with ExitStack() as hooks, TemporaryDirectory() as images:
        for graph, layers in ((VISION, visual.blocks), (DECODER, text.layers)):
            for index, layer in enumerate(layers):
                for name, module in layer.named_modules():
                    hooks.enter_context(module.register_forward_hook(note((graph, index), name)))
        for case in suite_cases(reference.checkpoint, Path(images)):
            if "ranges" in case.tags:
                reference.hidden_states(reference.prepare(case.prompt, case.images, lifted=case.lifted), keep=1)
    return [Range(graph, layer, *maximum) for (graph, layer), maximum in sorted(largest.items())]


def wide_layers(ranges: Sequence[Range]) -> Mapping[str, frozenset[int]]:
    """Graph → layers that stay fp32."""
    graphs = {layer.graph for layer in ranges}
    return {graph: frozenset(r.layer for r in ranges if r.graph == graph and r.wide) for graph in graphs}
