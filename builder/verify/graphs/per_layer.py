"""The three graphs of a folder on PyTorch's own inputs, compared behind every layer.

In: a configured folder (or a bundle), and what PyTorch went through. Out: gates in the order of the computation: vision
layers, features, embeddings, decoder layers, logits. Guaranteed: every graph is fed what PyTorch computed, so that an
error of one is not one of the next; the first layer whose residual stream leaves the tolerance has a gate of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from builder.bundle.layout import graph_files
from builder.checkpoint.parts import DECODER, EMBEDDINGS, VISION
from builder.graph.ports import RESIDUAL
from builder.reference.case_file import FP32
from builder.reference.model import Prompt, Reference, Trace
from builder.targets.graphs import GRAPHS
from builder.verify.graphs.sessions import merged
from builder.verify.graphs.slices import Values, run_slices, sliced
from builder.verify.report.exhibits import show_logits
from builder.verify.report.gates import Gate, compare_close, uncomputed


@dataclass(frozen=True)
class ReferenceCase:
    """A question as PyTorch gives it to the model, and what PyTorch made of it.

    Args:
        name: of the case, for the gates.
        limit: see `builder.reference.cases.Case`.
        more: inputs that a graph has been given besides those of builder/graph/ports.py.
    """

    name: str
    prompt: Prompt
    trace: Trace
    limit: float = FP32
    more: Mapping[str, np.ndarray] = field(default_factory=dict)


class SlicedGraphs:
    """The three graphs of a folder, run slice by slice on the reference's own inputs.

    Args:
        budget: bytes of weights in one slice.
        apart: each slice in a process of its own, which gives its memory back.
    """

    def __init__(self, folder: Path, target: str, reference: Reference, budget: int, apart: bool = True) -> None:
        self.folder, self.reference, self.budget, self.apart = folder, reference, budget, apart
        self.packed, self.merges = GRAPHS[target].packed, GRAPHS[target].merges
        self.levels = len(reference.checkpoint.vision.deepstack)
        self.peak = 0

    def vision_gates(self, asked: Sequence[ReferenceCase]) -> list[Gate]:
        """The residual stream behind each block, then main and DeepStack features."""
        seen = [one for one in asked if one.prompt.pixel_values is not None and one.prompt.image_grid_thw is not None]
        calls: list[list[Values]] = []
        for one in seen:
            assert one.prompt.pixel_values is not None
            assert one.prompt.image_grid_thw is not None
            inputs = {"pixel_values": one.prompt.pixel_values, "image_grid_thw": one.prompt.image_grid_thw}
            calls.append([{**inputs, **one.more}])
        gates = []
        for one, (values,) in zip(seen, self._run(VISION, calls), strict=True):
            gates += _layers("vision layers", one.name, values, one.trace.vision, slice(None), one.limit)
            main, *levels = zip(self._features(values), one.trace.features, strict=True)
            gates.append(compare_close("image features", one.name, *main, one.limit))
            gates += [
                compare_close("deepstack features", f"{one.name}, level {number}", *level, one.limit)
                for number, level in enumerate(levels)
            ]
        return gates

    def embedding_gates(self, asked: Sequence[ReferenceCase]) -> list[Gate]:
        """The lookup (and, in a packed graph, the merge and the scatter)."""
        calls = []
        for one in asked:
            call: Values = {"input_ids": one.prompt.input_ids, **one.more}
            if self.merges:
                call["image_features"] = np.concatenate(self._reference_features(one), axis=-1)
            calls.append([call])
        gates = []
        for one, (values,) in zip(asked, self._run(EMBEDDINGS, calls), strict=True):
            got = values["inputs_embeds"]
            main = self.reference.embed(one.prompt.input_ids)
            levels = [np.zeros_like(main)] * self.levels
            if not self.packed:
                gates.append(compare_close("embeddings", one.name, got, main, one.limit))
                continue
            if self.merges:
                main, levels = self._merged(one)
            for level, (a, b) in enumerate(zip(self._unpacked(got), (main, *levels), strict=True)):
                name = f"{one.name}, {f'level {level - 1}' if level else 'main'}"
                gates.append(compare_close("embeddings", name, a, b, one.limit))
        return gates

    def decoder_gates(self, asked: Sequence[ReferenceCase]) -> list[Gate]:
        """Prefill, a chunk of four tokens on that past, two single steps: every layer's stream, then the logits."""
        spans = [_spans(one.prompt.input_ids.shape[1]) for one in asked]
        calls = [
            [self._decoder_call(one, begin, end) for _, begin, end in row]
            for one, row in zip(asked, spans, strict=True)
        ]
        layers, logits = [], []
        for one, row, results in zip(asked, spans, self._run(DECODER, calls), strict=True):
            for (place, begin, end), values in zip(row, results, strict=True):
                name, part = f"{one.name}, tokens {begin}–{end}", slice(begin, end)
                layers += _layers("decoder layers", name, values, [x[0] for x in one.trace.decoder], part, one.limit)
                want = one.trace.logits[end - 1 : end] if self.packed else one.trace.logits[part]
                logits.append(compare_close(place, name, values["logits"][0], want, one.limit))
                show_logits(one.name, (begin, end), values["logits"][0], want)
        return layers + logits

    def _decoder_call(self, one: ReferenceCase, begin: int, end: int) -> Values:
        main, levels = self._merged(one)
        part = slice(begin, end)
        call: Values = {
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": one.prompt.position_ids[:, :, part],
            "inputs_embeds": main[:, part],
            **one.more,
        }
        pieces = [level[:, part] for level in levels]
        if self.packed:
            call["inputs_embeds"] = np.concatenate([main[:, part], *pieces], axis=-1)
        elif pieces:
            call["deepstack_embeds"] = np.stack(pieces)
        return call

    def _merged(self, one: ReferenceCase) -> tuple[np.ndarray, list[np.ndarray]]:
        ids = one.prompt.input_ids
        main, *levels = self._reference_features(one)
        return merged(self.reference.embed(ids), ids == self.reference.image_token_id, main, levels)

    def _reference_features(self, one: ReferenceCase) -> list[np.ndarray]:
        empty = np.zeros((0, self.reference.checkpoint.text.hidden), np.float32)
        return list(one.trace.features) or [empty] * (1 + self.levels)

    def _features(self, values: Values) -> list[np.ndarray]:
        if not self.packed:
            return [values["pooled_embeds"], *(values["deepstack_features"] if self.levels else ())]
        return self._unpacked(values["image_features"])

    def _unpacked(self, packed: np.ndarray) -> list[np.ndarray]:
        return np.split(packed, 1 + self.levels, axis=-1)

    def _run(self, name: str, calls: list[list[Values]]) -> list[list[Values]]:
        if not calls:
            return []
        path = graph_files(self.folder)[name]
        results, peak = run_slices(sliced(path, self.budget), path.parent, calls, apart=self.apart)
        self.peak = max(self.peak, peak)
        return results


def _layers(place: str, name: str, values: Values, want: Sequence[np.ndarray], part: slice, limit: float) -> list[Gate]:
    """The residual stream behind each layer; a graph that does not name one cannot be compared there."""
    gates = []
    for layer, stream in enumerate(want):
        got = values.get(f"{RESIDUAL}.{layer}")
        case = f"{name}, layer {layer}"
        if got is None:
            gates.append(uncomputed(place, case, KeyError(f"the graph has no {RESIDUAL}.{layer}")))
        else:
            gates.append(compare_close(place, case, got.reshape(-1, got.shape[-1]), stream[part], limit))
    return gates


def _spans(seq: int) -> list[tuple[str, int, int]]:
    cuts = [0, seq - 6, seq - 2, seq - 1, seq]
    places = ("decoder prefill", "decoder chunk", "decoder step", "decoder step")
    return list(zip(places, cuts, cuts[1:], strict=False))
