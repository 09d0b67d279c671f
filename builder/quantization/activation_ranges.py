"""How large activations get: what decides which layers fp16 can hold.

In: PyTorch in fp32 and cases with pictures of several sizes. Out: the largest magnitude inside each layer, and the
layers that come near what fp16 can hold. Guaranteed: every module's output in a layer is seen, and the residual
stream behind it; the figures are of real inputs, and so no bound: what exceeds a fraction of fp16's range is kept in
fp32.
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

MAGNITUDES = "largest magnitudes"  # what they are called in a report
FP16_MAX = float(np.finfo(np.float16).max)
MARGIN = 4.0  # between the largest magnitude seen and the largest that fits


@dataclass(frozen=True)
class Range:
    """The largest magnitude in one layer of a graph, and the module whose output has it ("" for the layer itself)."""

    graph: str
    layer: int
    magnitude: float
    module: str

    @property
    def wide(self) -> bool:
        """Whether the layer is kept in fp32."""
        return self.magnitude * MARGIN > FP16_MAX


def activation_ranges(reference: Reference) -> list[Range]:
    """One a layer, vision blocks first."""
    found: dict[tuple[str, int], tuple[float, str]] = {}

    def note(key: tuple[str, int], name: str) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, out: Any) -> None:
            value = out[0] if isinstance(out, tuple) else out
            if hasattr(value, "abs") and value.numel():
                found[key] = max(found.get(key, (0.0, "")), (float(value.abs().max()), name))

        return hook

    visual, text = reference.model.model.visual, reference.model.model.language_model
    with ExitStack() as hooks, TemporaryDirectory() as drawn:
        for graph, layers in ((VISION, visual.blocks), (DECODER, text.layers)):
            for index, layer in enumerate(layers):
                for name, module in layer.named_modules():
                    hooks.enter_context(module.register_forward_hook(note((graph, index), name)))
        for case in suite_cases(reference.checkpoint, Path(drawn)):
            if "ranges" in case.tags:
                reference.hidden_states(reference.prepare(case.prompt, case.images, lifted=case.lifted), keep=1)
    return [Range(graph, layer, *figures) for (graph, layer), figures in sorted(found.items(), reverse=False)]


def wide_layers(ranges: Sequence[Range]) -> Mapping[str, frozenset[int]]:
    """Graph → layers that are kept in fp32."""
    graphs = {one.graph for one in ranges}
    return {graph: frozenset(one.layer for one in ranges if one.graph == graph and one.wide) for graph in graphs}
