"""Compare the three graphs of a folder on PyTorch's own inputs, complete or slice by slice.

Every graph is given PyTorch's values, so that an error in one does not propagate to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from builder.bundle.layout import graph_files
from builder.checkpoint.parts import DECODER, EMBEDDINGS, VISION
from builder.reference.model import Reference
from builder.targets.graphs import GRAPHS
from builder.verify.graphs.compare import (
    GraphRunner,
    TraceCase,
    decoder_calls,
    decoder_gates,
    embedding_gates,
    spans,
    vision_gates,
)
from builder.verify.graphs.sessions import Array, Values, merged, unpacked
from builder.verify.graphs.slices import run_slices, sliced
from builder.verify.report.gates import Gate


class SlicedGraphs:
    """A `GraphRunner` that runs the graphs of a folder slice by slice.

    Args:
        budget: bytes of weights in one slice.
        separate: run each slice in a separate process, which frees its memory.
    """

    def __init__(self, folder: Path, target: str, hidden: int, budget: int, separate: bool = True) -> None:
        self.folder, self.hidden, self.budget, self.separate = folder, hidden, budget, separate
        self.packed, self.merges = GRAPHS[target].packed, GRAPHS[target].merges
        self.peak = 0

    def run(self, graph: str, conversations: Sequence[Sequence[Values]]) -> list[list[Values]]:
        """See `builder.verify.graphs.compare.GraphRunner`; updates `peak`, the largest peak of a process in bytes."""
        if not conversations:
            return []
        path = graph_files(self.folder)[graph]
        results, peak = run_slices(sliced(path, self.budget), path.parent, conversations, separate=self.separate)
        self.peak = max(self.peak, peak)
        return results


@dataclass(frozen=True)
class TraceComparison:
    """Compares graphs on PyTorch's inputs with PyTorch's outputs; each method returns a list of gates per case."""

    runner: GraphRunner
    reference: Reference

    def vision_gates(self, cases: Sequence[TraceCase]) -> list[list[Gate]]:
        """Compare the residual stream after each block, then main and DeepStack features, for cases with images."""
        seen, calls = [], []
        for case in cases:
            if case.prompt.pixel_values is not None and case.prompt.image_grid_thw is not None:
                inputs = {"pixel_values": case.prompt.pixel_values, "image_grid_thw": case.prompt.image_grid_thw}
                seen.append(case)
                calls.append([{**inputs, **case.more}])
        results = zip(seen, self.runner.run(VISION, calls), strict=True)
        return [vision_gates(case, self.runner, values) for case, (values,) in results]

    def embedding_gates(self, cases: Sequence[TraceCase]) -> list[list[Gate]]:
        """Compare the embeddings graph's output: a lookup or, if the graph merges features, `merged_embeddings`."""
        calls = []
        for case in cases:
            call: Values = {"input_ids": case.prompt.input_ids, **case.more}
            if self.runner.merges:
                call["image_features"] = np.concatenate(self.features(case), axis=-1)
            calls.append([call])
        results = zip(cases, self.runner.run(EMBEDDINGS, calls), strict=True)
        return [self._lookup_gates(case, values["inputs_embeds"]) for case, (values,) in results]

    def decoder_gates(self, cases: Sequence[TraceCase]) -> list[list[Gate]]:
        """Compare all layers and logits over prefill, a chunk of four tokens on that past, and two single steps."""
        rows = [spans(case.prompt.input_ids.shape[1]) for case in cases]
        calls = []
        for case, row in zip(cases, rows, strict=True):
            parts = self.merged_embeddings(case)
            inputs = decoder_calls(self.runner.packed, parts, case.prompt.position_ids, row)
            calls.append([{**call, **case.more} for call in inputs])
        results = zip(cases, rows, self.runner.run(DECODER, calls), strict=True)
        return [decoder_gates(case, self.runner.packed, row, values) for case, row, values in results]

    def features(self, case: TraceCase) -> list[Array]:
        """Return PyTorch's main features and DeepStack levels, [0, H] each without images."""
        checkpoint = self.reference.checkpoint
        empty = np.zeros((0, checkpoint.text.hidden), np.float32)
        return list(case.expected.features) or [empty] * (1 + len(checkpoint.vision.deepstack))

    def merged_embeddings(self, case: TraceCase) -> list[Array]:
        """Return PyTorch's embeddings with the features merged, then each DeepStack input."""
        ids, (main, *levels) = case.prompt.input_ids, self.features(case)
        embeds, spread = merged(self.reference.embed(ids), ids == self.reference.image_token_id, main, levels)
        return [embeds, *spread]

    def _lookup_gates(self, case: TraceCase, got: Array) -> list[Gate]:
        if self.runner.merges:
            return embedding_gates(case, unpacked(got, self.runner.hidden), self.merged_embeddings(case))
        want = self.reference.embed(case.prompt.input_ids)
        if not self.runner.packed:
            return [case.gate("embeddings", case.name, got, want)]
        blank = [np.zeros_like(want)] * len(self.reference.checkpoint.vision.deepstack)
        return embedding_gates(case, unpacked(got, self.runner.hidden), [want, *blank])
