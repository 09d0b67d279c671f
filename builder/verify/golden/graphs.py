"""The three graphs of a bundle, one after the other, against a golden's samples.

The graphs are those that ship, in sessions that give the residual stream after each layer as well; a graph is given
what the one before it computed, so that the first gate that fails is where a difference began.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from builder.checkpoint.parts import DECODER, VISION
from builder.graph.ports import RESIDUAL
from builder.reference.case_file import FP32
from builder.targets.clients.pipeline import Inputs
from builder.util.errors import BuildError
from builder.verify.golden.file import Golden, GoldenCase, Sample
from builder.verify.golden.record import floats
from builder.verify.graphs.compare import (
    Span,
    decoder_calls,
    decoder_gates,
    embedding_gates,
    features,
    logit_error,
    spans,
    vision_gates,
)
from builder.verify.graphs.sessions import Array, Graphs, Values
from builder.verify.report.gates import Gate, uncomputed


def compare_sampled(place: str, case: str, got: Array, want: Sample, limit: float = FP32) -> Gate:
    """A gate on the sampled values: the largest difference over the standard deviation of PyTorch's whole tensor."""
    if tuple(got.shape) != want.shape:
        return Gate(place, case, math.inf, limit, f"shape {got.shape}, expected {want.shape}")
    if not np.isfinite(got).all():
        return Gate(place, case, math.inf, limit, "a value is not finite")
    if not want.at:
        return Gate(place, case, 0.0, limit)
    expected = floats(want.values)
    off = np.abs(got.reshape(-1)[list(want.at)] - expected)
    error = float(off.max() / (float.fromhex(want.std) or 1.0))
    if error <= limit:
        return Gate(place, case, error, limit)
    worst = int(off.argmax())
    at = [int(one) for one in np.unravel_index(want.at[worst], got.shape)]
    value = got.reshape(-1)[want.at[worst]]
    detail = f"{error:.1e} of a standard deviation at {at}: {value:.6g}, PyTorch {expected[worst]:.6g}"
    return Gate(place, case, error, limit, detail)


@dataclass(frozen=True)
class SampledCase:
    """A golden's case: an `Expected`."""

    case: GoldenCase
    limit: float = FP32

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def vision(self) -> tuple[Sample, ...]:
        return self.case.vision

    @property
    def features(self) -> tuple[Sample, ...]:
        return self.case.features

    def gate(self, place: str, case: str, got: Array, want: Sample) -> Gate:
        return compare_sampled(place, case, got, want, self.limit)

    def decoder_layers(
        self, row: Sequence[Span], calls: Sequence[Values]
    ) -> Iterator[tuple[str, Values, Sequence[Sample]]]:
        """The streams of all calls, joined: a sample is of the whole prompt."""
        names = [name for name in calls[0] if name.startswith(f"{RESIDUAL}.")]
        streams = {name: [call[name].reshape(1, -1, call[name].shape[-1]) for call in calls] for name in names}
        yield self.name, {name: np.concatenate(parts, axis=1) for name, parts in streams.items()}, self.case.decoder

    def logits_gate(self, span: Span, logits: Array, packed: bool) -> Gate:
        """The last position alone."""
        place, begin, end = span
        want = self.case.logits[[last for _, _, last in spans(len(self.case.input_ids))].index(end)]
        return self.gate(place, f"{self.name}, tokens {begin}–{end}", logits[-1], want)


def graph_gates(
    graphs: Graphs, golden: Golden, case: GoldenCase, inputs: Inputs, limit: float = FP32
) -> tuple[list[Gate], float]:
    """Features, embeddings and logits of a case, as far as the golden has them.

    Args:
        graphs: loaded with `layer_outputs`.
        limit: see `builder.reference.cases.Case`.

    Returns:
        the gates, and the largest absolute difference of a logit: see `logit_error`.
    """
    expected, gates, place = SampledCase(case, limit), [], "image features"
    parts = [np.zeros((0, graphs.hidden), np.float32)] * max(len(case.embeddings), len(case.features), 1)
    try:
        if inputs.pixel_values is not None and inputs.image_grid_thw is not None:
            call: Values = {"pixel_values": inputs.pixel_values, "image_grid_thw": inputs.image_grid_thw}
            ((values,),) = graphs.run(VISION, [[call]])
            parts = features(graphs, values)
            gates += vision_gates(expected, graphs, values)
        place = "embeddings"
        if case.embeddings or case.logits:
            main, levels = graphs.embed(inputs.input_ids, parts[0], parts[1:], golden.image_token_id)
            parts = [main, *levels]
        if case.embeddings:
            gates += embedding_gates(expected, parts, case.embeddings)
        place = "decoder prefill"
        if case.logits:
            row = spans(inputs.input_ids.shape[1])
            (results,) = graphs.run(DECODER, [decoder_calls(graphs, parts, inputs.position_ids, row)])
            gates += decoder_gates(expected, graphs, row, results)
    except BuildError:
        raise
    except Exception as error:  # each runtime throws errors of its own for what its graphs cannot take
        gates.append(uncomputed(place, case.name, error))
    spread = max((float.fromhex(sample.std) for sample in case.logits), default=0.0)
    return gates, logit_error(gates, limit, spread)
