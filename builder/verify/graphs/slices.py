"""Cut a graph into slices after its layers, and run each in a separate process on the same data files.

The residual stream after layer N is named `residual.N`. Every node except constants is in exactly one slice.

Guarantees: no weight is copied; peak memory is that of the largest slice, freed when its process ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from builder.graph.ports import RESIDUAL
from builder.util import peak_memory
from builder.util.errors import BundleError
from builder.util.onnx_session import open_session
from builder.verify.graphs.sessions import PAST, PRESENT, Values

Pasts = list[list[tuple[int, int]]]  # for each call of each conversation: batch size, tokens in the past
MASK = "attention_mask"


@dataclass(frozen=True)
class Slice:
    """A part of a graph: a serialized ModelProto, and the bytes of its initializers on disk."""

    model: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class SliceResult:
    """The outputs of a slice for each call of each conversation, and the peak memory of its process in bytes."""

    outputs: list[list[Values]]
    peak_rss: int | None


def sliced(path: Path, budget: int) -> list[Slice]:
    """Cut the graph at `path` into slices of at most `budget` bytes of initializers, or one layer each."""
    model = onnx.load(path, load_external_data=False)
    sizes = {tensor.name: _nbytes(tensor) for tensor in model.graph.initializer}
    slices: list[Slice] = []
    begin, nbytes = 0, 0
    cuts = _cuts(model.graph)
    for before, after in zip([0, *cuts], [*cuts, len(model.graph.node)], strict=True):
        layer = sum(sizes.get(name, 0) for name in _read(model.graph.node[before:after]))
        if nbytes and nbytes + layer > budget:
            slices.append(_slice(model, begin, before, nbytes))
            begin, nbytes = before, 0
        nbytes += layer
    slices.append(_slice(model, begin, len(model.graph.node), nbytes))
    return slices


def run_slices(
    slices: Sequence[Slice], folder: Path, conversations: Sequence[Sequence[Values]], *, separate: bool = True
) -> tuple[list[list[Values]], int]:
    """Run every conversation through all slices of a graph.

    Args:
        folder: of the data files.
        conversations: sequences of calls with the graph's inputs except past_key_values, which is the present of the
            previous call (initially empty).
        separate: run each slice in a separate process.

    Returns:
        the graph's outputs and every `residual.N` of each call; the largest peak of a process, in bytes.

    Raises:
        BundleError: a slice does not load or run, or its process was killed.
    """
    pasts = [_past_shapes(calls) for calls in conversations]
    known = [[dict(call) for call in calls] for calls in conversations]
    kept: list[list[Values]] = [[{} for _ in calls] for calls in conversations]
    peak = 0
    for number, part in enumerate(slices):
        later = {name for other in slices[number + 1 :] for name in other.inputs}
        feeds = [[{name: call[name] for name in part.inputs if name in call} for call in calls] for calls in known]
        done = (_in_process if separate else compute)(part, folder, feeds, pasts)
        peak = max(peak, done.peak_rss or 0)
        for calls, results, outputs in zip(known, kept, done.outputs, strict=True):
            for call, result, values in zip(calls, results, outputs, strict=True):
                call |= {name: value for name, value in values.items() if name in later}
                result |= {name: value for name, value in values.items() if _is_result(name, later)}
    return kept, peak


def _past_shapes(calls: Sequence[Values]) -> list[tuple[int, int]]:
    masks = [call[MASK].shape if MASK in call else (1, 0) for call in calls]
    return [(batch, masks[number - 1][1] if number else 0) for number, (batch, _) in enumerate(masks)]


def _is_result(name: str, later: set[str]) -> bool:
    return name.startswith(f"{RESIDUAL}.") or not (name in later or name.startswith(PRESENT))


def _in_process(part: Slice, folder: Path, conversations: list[list[Values]], pasts: Pasts) -> SliceResult:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(compute, part, folder, conversations, pasts).result()
        except BrokenProcessPool as error:
            raise BundleError(
                f"the process that computed {part.outputs[0]} of {folder} was killed",
                found="probably out of memory",
                next="run `qwen3vl-onnx verify` with a smaller --memory, which makes smaller slices",
            ) from error


def compute(part: Slice, folder: Path, conversations: list[list[Values]], pasts: Pasts) -> SliceResult:
    """Load a slice and run every call.

    Raises:
        BundleError: ONNX Runtime cannot load or run it.
    """
    import onnxruntime

    try:
        session = open_session(part.model, folder)
        rows = zip(conversations, pasts, strict=True)
        return SliceResult([list(_calls(session, part, calls, past)) for calls, past in rows], peak_memory.peak_rss())
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise BundleError(
            f"a slice of a graph in {folder} does not run in onnxruntime {onnxruntime.__version__}",
            found=(str(error).splitlines() or [type(error).__name__])[0],
        ) from None


def _calls(session: Any, part: Slice, calls: list[Values], pasts: list[tuple[int, int]]) -> Iterator[Values]:
    ports = [port for port in session.get_inputs() if port.name.startswith(PAST)]
    values: Values = {}
    for call, (batch, length) in zip(calls, pasts, strict=True):
        # A past without a present belongs to another layer: the slice reads only its shape, as `_slice` checks.
        blank = {port.name: np.zeros((batch, port.shape[1], length, port.shape[3]), np.float32) for port in ports}
        past = {name: values.get(PRESENT + name.removeprefix(PAST), empty) for name, empty in blank.items()}
        values = dict(zip(part.outputs, session.run(list(part.outputs), {**call, **past}), strict=True))
        yield values


def _cuts(graph: onnx.GraphProto) -> list[int]:
    """Return the positions after the nodes that output a `residual.N`."""
    ends = [n + 1 for n, node in enumerate(graph.node) if any(x.startswith(f"{RESIDUAL}.") for x in node.output)]
    return [end for end in ends if end < len(graph.node)]


def _slice(model: onnx.ModelProto, begin: int, end: int, nbytes: int) -> Slice:
    graph = model.graph
    constants = {node.output[0]: node for node in graph.node[:begin] if node.op_type == "Constant"}
    nodes = list(graph.node[begin:end])
    nodes = [constants[name] for name in _read(nodes) if name in constants] + nodes
    computed = {name for node in nodes for name in node.output if name}
    weights = {tensor.name for tensor in graph.initializer}
    read = _read(nodes)
    inputs = [name for name in read if name not in computed and name not in weights]
    foreign = {name for name in inputs if name.startswith(PAST) and PRESENT + name.removeprefix(PAST) not in computed}
    if any(foreign & set(node.input) and node.op_type != "Shape" for node in nodes):
        raise BundleError(
            f"{graph.name}.onnx cannot be cut after its layers",
            expected="each layer's past read only by that layer",
            found=", ".join(sorted(foreign)),
        )
    later = set(_read(graph.node[end:])) | {port.name for port in graph.output}
    outputs = [
        name
        for node in nodes
        for name in node.output
        if node.op_type != "Constant" and (name in later or name.startswith(f"{RESIDUAL}."))
    ]
    types = {port.name: port for port in (*graph.value_info, *graph.input, *graph.output)}
    part = onnx.GraphProto(name=f"{graph.name}_{begin}_{end}")
    part.node.extend(nodes)
    part.initializer.extend(tensor for tensor in graph.initializer if tensor.name in read)
    part.input.extend(types[name] for name in inputs)
    part.output.extend(types.get(name, onnx.ValueInfoProto(name=name)) for name in outputs)
    proto = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, graph=part)
    return Slice(proto.SerializeToString(), tuple(inputs), tuple(outputs), nbytes)


def _read(nodes: Sequence[onnx.NodeProto]) -> list[str]:
    """Return every name that the nodes, or their subgraphs from outside, read; in order, without duplicates."""
    names: dict[str, None] = {}
    for node in nodes:
        names |= dict.fromkeys(name for name in node.input if name)
        for graph in (x.g for x in node.attribute if x.type == onnx.AttributeProto.GRAPH):
            inner = {name for inside in graph.node for name in inside.output} | {port.name for port in graph.input}
            inner |= {tensor.name for tensor in graph.initializer}
            names |= dict.fromkeys(name for name in _read(graph.node) if name not in inner)
            names |= dict.fromkeys(port.name for port in graph.output if port.name not in inner)
    return list(names)


def _nbytes(initializer: onnx.TensorProto) -> int:
    entries = {entry.key: entry.value for entry in initializer.external_data}
    return int(entries.get("length", initializer.ByteSize()))
