"""Compare the three graphs of a bundle with PyTorch, in the order of the computation.

A `GraphRunner` runs the graphs, complete or slice by slice; the expected values are a live trace or a golden's samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

import numpy as np

from builder.graph.ports import PACKED_FEATURES, PLAIN_FEATURES, RESIDUAL
from builder.reference.model import Prompt, Trace
from builder.verify.golden.file import GoldenCase, Sample, floats
from builder.verify.graphs.sessions import Array, Values, decoder_call, unpacked
from builder.verify.report.exhibits import show_logits
from builder.verify.report.gates import Gate, compare_close, uncomputed
from builder.verify.tolerances import FP32

# Ends of the decoder's calls, counted from the last token: prefill, a chunk on that past, two single steps.
ENDS = (-6, -2, -1, 0)
LOGITS = ("decoder prefill", "decoder chunk", "decoder step")
Span = tuple[str, int, int]  # place, begin and end of the tokens of a call
Expected = TypeVar("Expected", bound=Trace | GoldenCase, covariant=True)  # empty values are not compared


@dataclass(frozen=True)
class ReferenceCase(Generic[Expected]):
    """A prompt, and PyTorch's outputs for it.

    Args:
        limit: of gates with a tolerance, see `builder.verify.tolerances`.
        more: additional graph inputs, not in builder/graph/ports.py.
    """

    name: str
    prompt: Prompt
    expected: Expected
    limit: float = FP32
    more: Mapping[str, Array] = field(default_factory=dict)

    def gate(self, place: str, case: str, got: Array, want: Array | Sample) -> Gate:
        """Compare a computed array with the expected array or sample."""
        if isinstance(want, Sample):
            return compare_sampled(place, case, got, want, self.limit)
        return compare_close(place, case, got, want, self.limit)


TraceCase = ReferenceCase[Trace]
AnyCase = ReferenceCase[Trace | GoldenCase]


class GraphRunner(Protocol):
    """Runs the graphs of a bundle; `packed`, `merges`: see `builder.targets.graphs.GraphSettings`."""

    @property
    def packed(self) -> bool: ...
    @property
    def merges(self) -> bool: ...
    @property
    def hidden(self) -> int: ...
    def run(self, graph: str, conversations: Sequence[Sequence[Values]]) -> Iterable[list[Values]]:
        """Return the outputs of each call of each conversation by name, with `residual.N` if available.

        A call has the graph's inputs except past_key_values, which is the present of the previous call.
        """


def spans(seq: int) -> list[Span]:
    """Return the spans of the decoder's calls on a prompt of `seq` tokens."""
    ends = [seq + end for end in ENDS]
    return list(zip((*LOGITS, LOGITS[-1]), [0, *ends], ends, strict=False))


def decoder_calls(packed: bool, parts: Sequence[Array], positions: Array, row: Sequence[Span]) -> list[Values]:
    """Return the decoder's inputs for each span.

    Args:
        parts: embeddings, then each DeepStack input, [batch, seq, H] each.
        positions: [3, batch, seq].
    """
    calls = []
    for _, begin, end in row:
        mask = np.ones((len(parts[0]), end), np.int64)
        pieces = [part[:, begin:end] for part in parts]
        calls.append(decoder_call(packed, pieces, positions[:, :, begin:end], mask))
    return calls


def features(runner: GraphRunner, values: Values) -> list[Array]:
    """Return the main features [tokens, H], then each DeepStack level, from the vision encoder's outputs."""
    if runner.packed:
        return unpacked(values[PACKED_FEATURES], runner.hidden)
    return [values[PLAIN_FEATURES], *values.get("deepstack_features", ())]


def compare_sampled(place: str, case: str, got: Array, want: Sample, limit: float = FP32) -> Gate:
    """Return a gate on the sampled values: max |difference| / standard deviation of PyTorch's complete tensor."""
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
    at = list(map(int, np.unravel_index(want.at[worst], got.shape)))
    value = got.reshape(-1)[want.at[worst]]
    detail = f"{error:.1e} of a standard deviation at {at}: {value:.6g}, PyTorch {expected[worst]:.6g}"
    return Gate(place, case, error, limit, detail)


def vision_gates(case: AnyCase, runner: GraphRunner, values: Values) -> list[Gate]:
    """Compare the residual stream after each block, then main and DeepStack features."""
    gates = _layer_gates(case, "vision layers", case.name, values, case.expected.vision)
    if not case.expected.features:
        return gates
    (main, *levels), (want, *wanted) = features(runner, values), case.expected.features
    gates.append(case.gate("image features", case.name, main, want))
    return gates + _level_gates(case, "deepstack features", levels, wanted)


def embedding_gates(case: AnyCase, got: Sequence[Array], want: Sequence[Array | Sample]) -> list[Gate]:
    """Compare the merged embeddings, then each DeepStack input."""
    main = case.gate("embeddings", f"{case.name}, main", got[0], want[0])
    return [main, *_level_gates(case, "embeddings", got[1:], want[1:])]


def decoder_gates(case: AnyCase, packed: bool, row: Sequence[Span], calls: Sequence[Values]) -> list[Gate]:
    """Compare every layer's residual stream, then the logits of every call (of its last position, for a golden)."""
    layers, logits, expected = [], [], case.expected
    for number, ((place, begin, end), values) in enumerate(zip(row, calls, strict=True)):
        name, got = f"{case.name}, tokens {begin}–{end}", values["logits"][0]
        if isinstance(expected, GoldenCase):
            logits.append(case.gate(place, name, got[-1], expected.logits[number]))
            continue
        want = expected.logits[end - 1 if packed else begin : end]
        layers += _layer_gates(case, "decoder layers", name, values, [x[:, begin:end] for x in expected.decoder])
        logits.append(case.gate(place, name, got, want))
        show_logits(case.name, (begin, end), got, want)
    if isinstance(expected, GoldenCase):  # a sample covers the complete prompt
        names = [name for name in calls[0] if name.startswith(f"{RESIDUAL}.")]
        joined = {name: np.concatenate([call[name] for call in calls], axis=-2) for name in names}
        layers = _layer_gates(case, "decoder layers", case.name, joined, expected.decoder)
    return layers + logits


def _layer_gates(case: AnyCase, place: str, name: str, values: Values, want: Sequence[Array | Sample]) -> list[Gate]:
    """Compare the residual stream after each layer; a layer that is missing in the graph fails."""
    gates = []
    for layer, stream in enumerate(want):
        got, at = values.get(f"{RESIDUAL}.{layer}"), f"{name}, layer {layer}"
        if got is None:
            gate = uncomputed(place, at, KeyError(f"the graph has no {RESIDUAL}.{layer}"))
        else:
            shape = (*(1,) * (len(stream.shape) - 2), -1, got.shape[-1])
            gate = case.gate(place, at, got.reshape(shape), stream)
        gates.append(replace(gate, layer=layer))
    layers = sum(key.startswith(f"{RESIDUAL}.") for key in values)
    if want and layers > len(want):
        gates.append(Gate(place, name, math.inf, case.limit, f"{layers} layers, expected {len(want)}"))
    return gates


def _level_gates(case: AnyCase, place: str, got: Sequence[Array], want: Sequence[Array | Sample]) -> list[Gate]:
    if len(got) != len(want):
        return [Gate(place, case.name, math.inf, case.limit, f"{len(got)} levels, expected {len(want)}")]
    gates = [case.gate(place, f"{case.name}, level {n}", *pair) for n, pair in enumerate(zip(got, want, strict=True))]
    return [replace(gate, layer=level) for level, gate in enumerate(gates)]


def in_order(compute: Callable[[Sequence[TraceCase]], Iterable[list[Gate]]], cases: Sequence[TraceCase]) -> list[Gate]:
    """Return the gates of several cases, with those on logits last."""
    return sorted((gate for gates in compute(cases) for gate in gates), key=lambda gate: gate.place in LOGITS)


def logit_error(gates: Iterable[Gate], limit: float, std: float) -> float:
    """Return the largest absolute difference of a logit, capped by `limit`, for judging near ties.

    Args:
        std: of PyTorch's logits.
    """
    return min(max((gate.measured for gate in gates if gate.place in LOGITS), default=0.0), limit) * std
