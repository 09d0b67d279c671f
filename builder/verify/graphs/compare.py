"""Compare the three graphs of a bundle with PyTorch, place by place.

A `GraphRunner` runs the graphs, in whole sessions or slice by slice; an `Expected` compares an array at a named place,
with a live trace or with a golden's samples. Gates come in the order of the computation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from builder.graph.ports import PACKED_FEATURES, PLAIN_FEATURES, RESIDUAL
from builder.verify.graphs.sessions import Array, Values, decoder_call, unpacked
from builder.verify.report.gates import Gate, uncomputed

# The calls of a decoder, as ends counted from the last token: prefill, a chunk on that past, two single steps.
ENDS = (-6, -2, -1, 0)
LOGITS = ("decoder prefill", "decoder chunk", "decoder step")
T = TypeVar("T")
Span = tuple[str, int, int]  # the place, begin and end of the tokens of one call


class GraphRunner(Protocol):
    """Runs the graphs of a bundle; `packed`, `merges`: see `builder.targets.graphs.Graphs`."""

    @property
    def packed(self) -> bool: ...
    @property
    def merges(self) -> bool: ...
    @property
    def hidden(self) -> int: ...
    def run(self, graph: str, conversations: Sequence[Sequence[Values]]) -> Iterable[list[Values]]:
        """Outputs of each call of each conversation by name, and `residual.N` where the runner gives them.

        A call has the graph's inputs except past_key_values, which is the present of the call before it.
        """
        ...


class Expected(Protocol):
    """What PyTorch computed for one case: arrays, or samples of them. Nothing is compared where there are none."""

    @property
    def name(self) -> str: ...
    @property
    def limit(self) -> float: ...
    @property
    def vision(self) -> Sequence[Any]: ...
    @property
    def features(self) -> Sequence[Any]: ...
    def gate(self, place: str, case: str, got: Array, want: Any) -> Gate:
        """One array against one of those expected."""
        ...

    def decoder_layers(
        self, spans: Sequence[Span], calls: Sequence[Values]
    ) -> Iterable[tuple[str, Values, Sequence[Any]]]:
        """(case, values with the residual streams, what is expected of each layer)."""
        ...

    def logits_gate(self, span: Span, logits: Array, packed: bool) -> Gate:
        """The logits [tokens (packed: 1), vocab] of one call."""
        ...


def spans(seq: int) -> list[Span]:
    """The decoder's calls on a prompt of `seq` tokens."""
    ends = [seq + end for end in ENDS]
    return list(zip((*LOGITS, LOGITS[-1]), [0, *ends], ends, strict=False))


def decoder_calls(runner: GraphRunner, parts: Sequence[Array], positions: Array, row: Sequence[Span]) -> list[Values]:
    """Those calls.

    Args:
        parts: embeddings, then each DeepStack input, [batch, seq, H] each.
        positions: [3, batch, seq].
    """
    calls = []
    for _, begin, end in row:
        mask = np.ones((len(parts[0]), end), np.int64)
        pieces = [part[:, begin:end] for part in parts]
        calls.append(decoder_call(runner.packed, pieces, positions[:, :, begin:end], mask))
    return calls


def features(runner: GraphRunner, values: Values) -> list[Array]:
    """Main features [tokens, H], then each DeepStack level, from the vision encoder's outputs."""
    if runner.packed:
        return unpacked(values[PACKED_FEATURES], runner.hidden)
    return [values[PLAIN_FEATURES], *values.get("deepstack_features", ())]


def vision_gates(expected: Expected, runner: GraphRunner, values: Values) -> list[Gate]:
    """The residual stream after each block, then main and DeepStack features."""
    gates = layer_gates(expected, "vision layers", expected.name, values, expected.vision)
    if not expected.features:
        return gates
    main, *levels = features(runner, values)
    gates.append(expected.gate("image features", expected.name, main, expected.features[0]))
    return gates + _level_gates(expected, "deepstack features", levels, expected.features[1:])


def embedding_gates(expected: Expected, got: Sequence[Array], want: Sequence[Any]) -> list[Gate]:
    """The merged embeddings, then each DeepStack input."""
    main = expected.gate("embeddings", f"{expected.name}, main", got[0], want[0])
    return [main, *_level_gates(expected, "embeddings", got[1:], want[1:])]


def decoder_gates(expected: Expected, runner: GraphRunner, row: Sequence[Span], calls: Sequence[Values]) -> list[Gate]:
    """Every layer's residual stream, then the logits of every call."""
    layers = expected.decoder_layers(row, calls)
    gates = [gate for layer in layers for gate in layer_gates(expected, "decoder layers", *layer)]
    logits = zip(row, calls, strict=True)
    return gates + [expected.logits_gate(span, values["logits"][0], runner.packed) for span, values in logits]


def layer_gates(expected: Expected, place: str, case: str, values: Values, want: Sequence[Any]) -> list[Gate]:
    """The residual stream after each layer; a layer whose stream the graph does not name fails."""
    gates = []
    for layer, stream in enumerate(want):
        name, got = f"{case}, layer {layer}", values.get(f"{RESIDUAL}.{layer}")
        if got is None:
            gates.append(uncomputed(place, name, KeyError(f"the graph has no {RESIDUAL}.{layer}")))
        else:
            shape = (*(1,) * (len(stream.shape) - 2), -1, got.shape[-1])
            gates.append(expected.gate(place, name, got.reshape(shape), stream))
    found = sum(name.startswith(f"{RESIDUAL}.") for name in values)
    if want and found > len(want):
        gates.append(Gate(place, case, math.inf, expected.limit, f"{found} layers, expected {len(want)}"))
    return gates


def _level_gates(expected: Expected, place: str, got: Sequence[Array], want: Sequence[Any]) -> list[Gate]:
    if len(got) != len(want):
        detail = f"{len(got)} levels, expected {len(want)}"
        return [Gate(place, expected.name, math.inf, expected.limit, detail)]
    pairs = enumerate(zip(got, want, strict=True))
    return [expected.gate(place, f"{expected.name}, level {level}", *pair) for level, pair in pairs]


def in_order(compute: Callable[[Sequence[T]], Iterable[list[Gate]]], cases: Sequence[T]) -> list[Gate]:
    """The gates of several cases: the logits of all of them last."""
    return sorted((gate for gates in compute(cases) for gate in gates), key=lambda gate: gate.place in LOGITS)


def logit_error(gates: Iterable[Gate], limit: float, std: float) -> float:
    """The largest absolute difference of a logit that may excuse a token: no more than `limit` allows.

    Args:
        std: of PyTorch's logits.
    """
    return min(max((gate.measured for gate in gates if gate.place in LOGITS), default=0.0), limit) * std
