"""Measure the threshold of each gate with a tolerance: the largest relative error that passes.

Errors are tried at powers of ten from 1e-7 to 1, then at ten steps within the decade where the gate begins to fail.
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
    edited,
    feature_levels,
    insert_after,
    port,
    reader,
    replace_output,
    weight,
)

FACTOR = "mutation_factor"
DECADES = tuple(10.0**power for power in range(-7, 1))
STEPS = 10  # per decade


@dataclass(frozen=True)
class Site:
    """A value of `graph` to scale, and the place of the gate that must notice."""

    place: str
    what: str
    graph: str
    find: Callable[[ir.Graph, str], ir.Value]


@dataclass(frozen=True)
class Threshold:
    """The largest relative error that a gate passes.

    Args:
        place: of the gate.
        what: the value that is scaled by 1 + error.
        passes: the largest error tried that passes; 0 if none.
        fails: the smallest error tried that fails; None if none, so that the gate checks nothing.
    """

    place: str
    what: str
    passes: float
    fails: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def sites(target: str, levels: int, blocks: int, layers: int) -> tuple[Site, ...]:
    """Return the values to scale: an MLP in the middle of each stack, and each graph's outputs."""
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


def measure_threshold(
    site: Site, folder: Path, target: str, case: TraceCase, graphs: Callable[[Path], TraceComparison]
) -> Threshold:
    """Measure the threshold of one gate.

    Args:
        folder: a copy of the bundle, which is changed.
        case: a traced case with images.
        graphs: opens the graphs of a folder.
    """
    with edited(folder, site.graph) as graph:
        value = site.find(graph, target)
        factor = ir.val(FACTOR, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
        graph.inputs.append(factor)
        insert = replace_output if value.is_graph_output() else insert_after
        insert(graph, value, ir.node("Mul", [value, factor]))
    opened = graphs(folder)
    compute: Mapping[str, Callable[[Sequence[TraceCase]], list[list[Gate]]]] = {
        VISION: opened.vision_gates,
        EMBEDDINGS: opened.embedding_gates,
        DECODER: opened.decoder_gates,
    }

    def passes(errors: Sequence[float]) -> list[bool]:
        factors = [np.asarray(1 + error, np.float32) for error in errors]
        scaled = [replace(case, more={FACTOR: factor}) for factor in factors]
        rows = [[gate.ok for gate in gates if gate.place == site.place] for gates in compute[site.graph](scaled)]
        return [bool(row) and all(row) for row in rows]

    return Threshold(site.place, site.what, *find_threshold(passes))


def find_threshold(passes: Callable[[Sequence[float]], list[bool]]) -> tuple[float, float | None]:
    """Return the largest error up to which all errors tried pass, and the smallest that fails.

    Args:
        passes: ascending errors → for each, whether the gate passes.
    """
    passing, failing = _split(DECADES, passes(DECADES))
    if failing is None or passing == 0:
        return passing, failing
    finer = [passing * 10 ** (step / STEPS) for step in range(1, STEPS)]
    below, above = _split(finer, passes(finer))
    return below or passing, failing if above is None else above


def _split(errors: Sequence[float], passed: Sequence[bool]) -> tuple[float, float | None]:
    at = next((index for index, ok in enumerate(passed) if not ok), None)
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
