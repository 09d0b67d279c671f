"""How much may be wrong before a gate with a tolerance says so.

In: a bundle's folder, what PyTorch went through for one case, a way to run graphs. Out: a `Survivor` for each gate: the
largest relative error of one value that it lets live. Guaranteed: a gate is asked at every power of ten from 1e-7 to 1
and at ten steps within the decade where it begins to fail; one that lets a doubled value live is shown as such.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from builder.checkpoint.parts import DECODER, EMBEDDINGS, VISION
from builder.graph.ports import RESIDUAL
from builder.targets.graphs import GRAPHS
from builder.verify.graphs.compare import TraceCase
from builder.verify.graphs.per_layer import TraceComparison
from builder.verify.report.gates import Gate
from builder.verify.self_test.edits import (
    DOWN,
    InapplicableError,
    as_output,
    behind,
    edited,
    feature_levels,
    port,
    reader,
    weight,
)

FACTOR = "mutation_factor"
DECADES = tuple(10.0**power for power in range(-7, 1))
STEPS = 10  # within a decade


@dataclass(frozen=True)
class Site:
    """A value that is scaled: `graph` holds it, `place` is the gate that must notice."""

    place: str
    what: str
    graph: str
    find: Callable[[ir.Graph, str], ir.Value]


@dataclass(frozen=True)
class Survivor:
    """The largest relative error that passes.

    Args:
        place: the gate.
        what: the value that is scaled by 1 + error.
        passes: the largest that was tried and passes; 0 if none does.
        fails: the smallest that was tried and fails; None if none does, which makes the gate no check.
    """

    place: str
    what: str
    passes: float
    fails: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def sites(target: str, levels: int, blocks: int, layers: int) -> tuple[Site, ...]:
    """What is scaled: a feed-forward network in the middle of either stack, and what each graph gives."""
    block, layer = blocks // 2, layers // 2
    features = GRAPHS[target].features
    return (
        Site("vision layers", f"MLP of block {block}", VISION, lambda graph, _: _added(graph, block)),
        Site("image features", "main features", VISION, lambda graph, t: _main(graph, t, features)),
        *(Site("deepstack features", f"level {level}", VISION, partial(_level, level)) for level in range(levels)),
        Site("embeddings", "inputs_embeds", EMBEDDINGS, lambda graph, _: port(graph.outputs, "inputs_embeds")),
        Site("decoder layers", f"MLP of layer {layer}", DECODER, lambda graph, _: _down(graph, layer)),
        Site("decoder prefill", "logits", DECODER, lambda graph, _: port(graph.outputs, "logits")),
    )


def survivor(
    site: Site, folder: Path, target: str, asked: TraceCase, graphs: Callable[[Path], TraceComparison]
) -> Survivor:
    """What one gate lets live.

    Args:
        folder: a copy of the bundle that may be changed.
        asked: a case with images.
        graphs: runs those of a folder.
    """
    with edited(folder, site.graph) as graph:
        value = site.find(graph, target)
        factor = ir.val(FACTOR, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
        graph.inputs.append(factor)
        place = as_output if value.is_graph_output() else behind
        place(graph, value, ir.node("Mul", [value, factor]))
    opened = graphs(folder)
    compute: Mapping[str, Callable[[Sequence[TraceCase]], list[list[Gate]]]] = {
        VISION: opened.vision_gates,
        EMBEDDINGS: opened.embedding_gates,
        DECODER: opened.decoder_gates,
    }

    def holds(errors: Sequence[float]) -> list[bool]:
        factors = [np.asarray(1 + error, np.float32) for error in errors]
        many = [replace(asked, more={FACTOR: factor}) for factor in factors]
        rows = [[gate.ok for gate in gates if gate.place == site.place] for gates in compute[site.graph](many)]
        return [bool(row) and all(row) for row in rows]

    return Survivor(site.place, site.what, *edge(holds))


def edge(holds: Callable[[Sequence[float]], list[bool]]) -> tuple[float, float | None]:
    """The largest error below which all that were tried hold, and the smallest that does not.

    Args:
        holds: errors, ascending → of each, whether the gate holds.
    """
    passes, fails = _split(DECADES, holds(DECADES))
    if fails is None or passes == 0:
        return passes, fails
    finer = [passes * 10 ** (step / STEPS) for step in range(1, STEPS)]
    below, above = _split(finer, holds(finer))
    return below or passes, fails if above is None else above


def _split(errors: Sequence[float], held: Sequence[bool]) -> tuple[float, float | None]:
    at = next((index for index, ok in enumerate(held) if not ok), None)
    if at is None:
        return errors[-1], None
    return errors[at - 1] if at else 0.0, errors[at]


def _added(graph: ir.Graph, block: int) -> ir.Value:
    (node,) = [node for node in graph if any(value.name == f"{RESIDUAL}.{block}" for value in node.outputs)]
    value = node.inputs[1]
    assert value is not None
    return value


def _main(graph: ir.Graph, target: str, name: str) -> ir.Value:
    output = port(graph.outputs, name)
    try:
        packing, _ = feature_levels(graph, target)
    except InapplicableError:
        return output
    first = packing.inputs[0]
    return first if GRAPHS[target].packed and first is not None else output


def _level(level: int, graph: ir.Graph, target: str) -> ir.Value:
    packing, levels = feature_levels(graph, target)
    value = packing.inputs[levels[level]]
    assert value is not None
    return value


def _down(graph: ir.Graph, layer: int) -> ir.Value:
    return reader(weight(graph, DOWN.format(layer))).outputs[0]
