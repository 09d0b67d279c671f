"""The three graphs of a bundle, one after the other, against a golden's samples.

In: a bundle's folder, a case's inputs, what PyTorch made of them. Out: gates, in the order of the computation.
Guaranteed: the graphs are those that ship, asked for the residual stream behind each layer besides their outputs; a
graph is given what the one before it made, so that the first gate that fails is where a difference began.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from builder.bundle.layout import graph_files
from builder.checkpoint.parts import DECODER, VISION
from builder.graph.ports import RESIDUAL, ROLES
from builder.reference.case_file import FP32
from builder.targets.clients.pipeline import Inputs
from builder.util.errors import BundleError
from builder.verify.golden.file import Golden, GoldenCase, Sample
from builder.verify.golden.record import POSITIONS, floats
from builder.verify.graphs.sessions import Array, Graphs
from builder.verify.report.gates import Gate, guarded


@dataclass(frozen=True)
class SessionsWithLayerOutputs:
    """The graphs in sessions that also give `residual.N`; `streams` are those names, by graph."""

    graphs: Graphs
    streams: dict[str, tuple[str, ...]]

    @classmethod
    def load(cls, folder: Path, packed: bool, hidden: int) -> SessionsWithLayerOutputs:
        """Opens the sessions on the CPU.

        Raises:
            BundleError: ONNX Runtime does not accept a graph.
        """
        files = graph_files(folder)
        opened = {name: _session(files[name]) for name in ROLES}
        vision, embeddings, decoder = (session for session, _ in opened.values())
        return cls(
            Graphs(vision, embeddings, decoder, packed, hidden),
            {name: streams for name, (_, streams) in opened.items()},
        )

    def run(self, name: str, session: Any, feed: dict[str, Array]) -> dict[str, Array]:
        """Every output of a graph and its streams, by name."""
        names = [port.name for port in session.get_outputs()]
        return dict(zip(names, session.run(names, feed), strict=True))


def _session(path: Path) -> tuple[Any, tuple[str, ...]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        model = onnx.load(path, load_external_data=False)
        made = [value for node in model.graph.node for value in node.output if value.startswith(f"{RESIDUAL}.")]
        streams = sorted(made, key=lambda one: int(one.removeprefix(f"{RESIDUAL}.")))
        model.graph.output.extend(onnx.ValueInfoProto(name=stream) for stream in streams)
        serialized = model.SerializeToString()
        return onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"]), tuple(streams)
    except Exception as error:  # neither package has a base class of its own for what it throws
        raise BundleError(
            f"{path} does not load in onnxruntime {onnxruntime.__version__}",
            found=(str(error).splitlines() or [type(error).__name__])[0],
            next="build it again: python -m builder build --force export",
        ) from error


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


def rows(place: str, case: str, got: Sequence[Array], want: Sequence[Sample], kind: str, limit: float) -> list[Gate]:
    """A gate for each of a row of tensors; another number of them fails."""
    if len(got) != len(want):
        return [Gate(place, case, math.inf, limit, f"{len(got)} {kind}s, expected {len(want)}")]
    return [
        compare_sampled(place, f"{case}, {kind} {n}", *pair, limit)
        for n, pair in enumerate(zip(got, want, strict=True))
    ]


def graph_gates(
    tapped: SessionsWithLayerOutputs, golden: Golden, case: GoldenCase, inputs: Inputs, limit: float = FP32
) -> tuple[list[Gate], float]:
    """Features, embeddings and logits of a case, as far as the golden has them.

    Args:
        limit: see `builder.reference.cases.Case`.

    Returns the gates, and the largest absolute difference of a logit that may excuse a token (see
    builder/verify/whole.py).
    """
    gates: list[Gate] = []
    graphs = tapped.graphs
    main = np.zeros((0, graphs.hidden), np.float32)
    levels = [main] * (max(len(case.embeddings), len(case.features), 1) - 1)
    if inputs.pixel_values is not None and inputs.image_grid_thw is not None:
        found: list[Array] = []
        gates += guarded("image features", case.name, _vision, tapped, case, inputs, found, limit)
        if not found:
            return gates, 0.0
        main, *levels = found
    if not case.embeddings and not case.logits:
        return gates, 0.0
    embedded: list[Array] = []
    gates += guarded(
        "embeddings", case.name, _embeddings, tapped, golden, case, inputs, [main, *levels], embedded, limit
    )
    if not embedded or not case.logits:
        return gates, 0.0
    decoded = guarded("decoder prefill", case.name, _decoder, tapped, case, inputs, embedded, limit)
    spread = max(float.fromhex(row.std) for row in case.logits)
    return gates + decoded, min(max(_logit_errors(decoded), default=0.0), limit) * spread


def _logit_errors(gates: Iterable[Gate]) -> list[float]:
    return [gate.measured for gate in gates if gate.place != "decoder layers"]


def _vision(
    tapped: SessionsWithLayerOutputs, case: GoldenCase, inputs: Inputs, found: list[Array], limit: float
) -> list[Gate]:
    assert inputs.pixel_values is not None
    assert inputs.image_grid_thw is not None
    feed: dict[str, Array] = {"pixel_values": inputs.pixel_values, "image_grid_thw": inputs.image_grid_thw}
    values = tapped.run(VISION, tapped.graphs.vision_encoder, feed)
    streams = [values.pop(name).reshape(-1, values_width) for name, values_width in _widths(values, tapped)]
    main, *rest = values.values()
    if tapped.graphs.packed:
        hidden = tapped.graphs.hidden
        main, *rest = (main[..., i : i + hidden] for i in range(0, main.shape[-1], hidden))
    else:
        rest = list(rest[0]) if rest else []
    found += [main, *rest]
    gates = rows("vision layers", case.name, streams, case.vision, "layer", limit) if case.vision else []
    if case.features:
        gates.append(compare_sampled("image features", case.name, main, case.features[0], limit))
        gates += rows("deepstack features", case.name, rest, case.features[1:], "level", limit)
    return gates


def _widths(values: dict[str, Array], tapped: SessionsWithLayerOutputs) -> list[tuple[str, int]]:
    return [(name, values[name].shape[-1]) for name in tapped.streams[VISION]]


def _embeddings(
    tapped: SessionsWithLayerOutputs,
    golden: Golden,
    case: GoldenCase,
    inputs: Inputs,
    features: list[Array],
    found: list[Array],
    limit: float,
) -> list[Gate]:
    main, levels = tapped.graphs.embed(inputs.input_ids, features[0], features[1:], golden.image_token_id)
    found += [main, *levels]
    if not case.embeddings:
        return []
    gates = [compare_sampled("embeddings", f"{case.name}, main", main, case.embeddings[0], limit)]
    return gates + rows("embeddings", case.name, levels, case.embeddings[1:], "level", limit)


def _decoder(
    tapped: SessionsWithLayerOutputs, case: GoldenCase, inputs: Inputs, embedded: list[Array], limit: float
) -> list[Gate]:
    """Prefill of all but six tokens, a chunk of four on that past, two single steps."""
    graphs, seq = tapped.graphs, inputs.input_ids.shape[1]
    ends = [seq + 1 + position for position in POSITIONS]
    places = ("decoder prefill", "decoder chunk", "decoder step", "decoder step")
    past = graphs.empty_past(1)
    presents = [name.replace("past_key_values", "present") for name in past]
    streams: list[list[Array]] = []
    gates: list[Gate] = []
    for place, begin, end, want in zip(places, [0, *ends], ends, case.logits, strict=False):
        main, *levels = (tensor[:, begin:end] for tensor in embedded)
        positions, mask = inputs.position_ids[:, :, begin:end], np.ones((1, end), np.int64)
        feed = graphs.decoder_feed(main, levels, positions, mask, past)
        values = tapped.run(DECODER, graphs.model, feed)
        past = dict(zip(past, (values[name] for name in presents), strict=True))
        streams.append([values[name] for name in tapped.streams[DECODER]])
        gates.append(compare_sampled(place, f"{case.name}, tokens {begin}–{end}", values["logits"][0, -1], want, limit))
    layers = zip(*streams, strict=True)
    whole = [np.concatenate([one.reshape(1, -1, one.shape[-1]) for one in layer], axis=1) for layer in layers]
    return [*rows("decoder layers", case.name, whole, case.decoder, "layer", limit), *gates]
