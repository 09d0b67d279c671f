"""A graph in slices: cut behind layers, each run by a process of its own, all reading the same data files.

In: a bundle's `.onnx`, whose residual stream behind layer N is called `residual.N`. Out: `Slice`s, which run one after
the other are the graph: every node but a constant is in exactly one of them. Guaranteed: no weight is
copied or rewritten; memory is that of the largest slice, in a process that ends with it.
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

Pasts = list[list[tuple[int, int]]]  # of each call of each conversation: the batch, the tokens in its past
MASK = "attention_mask"


@dataclass(frozen=True)
class Slice:
    """A part of a graph: `model` is a serialized ModelProto, `nbytes` what its initializers are on disk."""

    model: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class Ran:
    """What a slice gave for each call of each conversation, and the peak of its process in bytes."""

    outputs: list[list[Values]]
    peak_rss: int | None


def sliced(path: Path, budget: int) -> list[Slice]:
    """The graph at `path` as slices whose initializers are at most `budget` bytes, or one layer each."""
    model = onnx.load(path, load_external_data=False)
    sizes = {one.name: _nbytes(one) for one in model.graph.initializer}
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
    slices: Sequence[Slice], folder: Path, conversations: Sequence[Sequence[Values]], *, apart: bool = True
) -> tuple[list[list[Values]], int]:
    """Runs every conversation through the whole graph.

    Args:
        folder: where the data files lie.
        conversations: each a row of calls, whose values are the graph's inputs but for past_key_values; a call's
            past is the present of the one before it, and the first one's is empty.
        apart: each slice in a process of its own.

    Returns:
        the graph's outputs and every `residual.N` of each call; the largest peak of a slice's process, in bytes.

    Raises:
        BundleError: a slice does not load or run, or its process is gone.
    """
    pasts = [_past_shapes(calls) for calls in conversations]
    known = [[dict(call) for call in calls] for calls in conversations]
    kept: list[list[Values]] = [[{} for _ in calls] for calls in conversations]
    peak = 0
    for number, one in enumerate(slices):
        later = {name for other in slices[number + 1 :] for name in other.inputs}
        feeds = [[{name: call[name] for name in one.inputs if name in call} for call in calls] for calls in known]
        ran = (_apart if apart else compute)(one, folder, feeds, pasts)
        peak = max(peak, ran.peak_rss or 0)
        for calls, results, found in zip(known, kept, ran.outputs, strict=True):
            for call, result, values in zip(calls, results, found, strict=True):
                call |= {name: value for name, value in values.items() if name in later}
                result |= {name: value for name, value in values.items() if _is_result(name, later)}
    return kept, peak


def _past_shapes(calls: Sequence[Values]) -> list[tuple[int, int]]:
    masks = [call[MASK].shape if MASK in call else (1, 0) for call in calls]
    return [(batch, masks[number - 1][1] if number else 0) for number, (batch, _) in enumerate(masks)]


def _is_result(name: str, later: set[str]) -> bool:
    return name.startswith(f"{RESIDUAL}.") or not (name in later or name.startswith(PRESENT))


def _apart(one: Slice, folder: Path, conversations: list[list[Values]], pasts: Pasts) -> Ran:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(compute, one, folder, conversations, pasts).result()
        except BrokenProcessPool as error:
            raise BundleError(
                f"the process that ran {one.outputs[0]} of {folder} is gone",
                found="killed, most likely for want of memory",
                next="run `qwen3vl-onnx verify` with a smaller --memory, which makes smaller slices",
            ) from error


def compute(one: Slice, folder: Path, conversations: list[list[Values]], pasts: Pasts) -> Ran:
    """Loads the slice and runs every call.

    Raises:
        BundleError: ONNX Runtime does not load or run it.
    """
    import onnxruntime

    try:
        session = open_session(one.model, folder)
        rows = zip(conversations, pasts, strict=True)
        return Ran([list(_calls(session, one, calls, past)) for calls, past in rows], peak_memory.peak_rss())
    except Exception as error:  # the runtime has no base class of its own for what it throws
        raise BundleError(
            f"a slice of a graph in {folder} does not run in onnxruntime {onnxruntime.__version__}",
            found=(str(error).splitlines() or [type(error).__name__])[0],
        ) from None


def _calls(session: Any, one: Slice, calls: list[Values], pasts: list[tuple[int, int]]) -> Iterator[Values]:
    ports = [port for port in session.get_inputs() if port.name.startswith(PAST)]
    values: Values = {}
    for call, (batch, length) in zip(calls, pasts, strict=True):
        # Another layer's past has no present here: a slice may ask for its shape, as `sliced` has made sure.
        blank = {port.name: np.zeros((batch, port.shape[1], length, port.shape[3]), np.float32) for port in ports}
        past = {name: values.get(PRESENT + name.removeprefix(PAST), empty) for name, empty in blank.items()}
        values = dict(zip(one.outputs, session.run(list(one.outputs), {**call, **past}), strict=True))
        yield values


def _cuts(graph: onnx.GraphProto) -> list[int]:
    """Positions behind the nodes that make a `residual.N`."""
    made = [any(name.startswith(f"{RESIDUAL}.") for name in node.output) for node in graph.node]
    return [position + 1 for position, hit in enumerate(made) if hit and position + 1 < len(made)]


def _slice(model: onnx.ModelProto, begin: int, end: int, nbytes: int) -> Slice:
    graph = model.graph
    constants = {node.output[0]: node for node in graph.node[:begin] if node.op_type == "Constant"}
    nodes = list(graph.node[begin:end])
    nodes = [constants[name] for name in _read(nodes) if name in constants] + nodes
    made = {name for node in nodes for name in node.output if name}
    weights = {one.name for one in graph.initializer}
    read = _read(nodes)
    inputs = [name for name in read if name not in made and name not in weights]
    foreign = {name for name in inputs if name.startswith(PAST) and PRESENT + name.removeprefix(PAST) not in made}
    if any(foreign & set(node.input) and node.op_type != "Shape" for node in nodes):
        raise BundleError(
            f"{graph.name}.onnx cannot be cut behind its layers",
            expected="each layer's past read by that layer",
            found=", ".join(sorted(foreign)),
        )
    later = set(_read(graph.node[end:])) | {port.name for port in graph.output}
    outputs = [
        name
        for node in nodes
        for name in node.output
        if node.op_type != "Constant" and (name in later or name.startswith(f"{RESIDUAL}."))
    ]
    types = {one.name: one for one in (*graph.value_info, *graph.input, *graph.output)}
    part = onnx.GraphProto(name=f"{graph.name}_{begin}_{end}")
    part.node.extend(nodes)
    part.initializer.extend(one for one in graph.initializer if one.name in read)
    part.input.extend(types[name] for name in inputs)
    part.output.extend(types.get(name, onnx.ValueInfoProto(name=name)) for name in outputs)
    whole = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, graph=part)
    return Slice(whole.SerializeToString(), tuple(inputs), tuple(outputs), nbytes)


def _read(nodes: Sequence[onnx.NodeProto]) -> list[str]:
    """Every name that the nodes read, and their subgraphs from outside, in order, each once."""
    names: dict[str, None] = {}
    for node in nodes:
        names |= dict.fromkeys(name for name in node.input if name)
        for graph in (one.g for one in node.attribute if one.type == onnx.AttributeProto.GRAPH):
            inner = {name for inside in graph.node for name in inside.output} | {port.name for port in graph.input}
            inner |= {one.name for one in graph.initializer}
            names |= dict.fromkeys(name for name in _read(graph.node) if name not in inner)
            names |= dict.fromkeys(port.name for port in graph.output if port.name not in inner)
    return list(names)


def _nbytes(initializer: onnx.TensorProto) -> int:
    entries = {one.key: one.value for one in initializer.external_data}
    return int(entries.get("length", initializer.ByteSize()))
