"""In: two graphs with quantized matrices. Out: how far apart the matrices are that an operator reads in both.

Guaranteed: rows are dequantized a few at a time, whatever the bits, the block size and the operator are on either side;
parts that do not fit together are no matrix, and are compared as the initializers that they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from onnx import ModelProto

from builder.bundle.diff.weights import Values, WeightChange, errors
from builder.bundle.initializer import COUNT, Initializer
from builder.bundle.quantized_matrix import OPERATORS, QuantizedMatrix, quantized_inputs, quantized_matrix
from builder.graph.introspection import every_graph

LEVELS = ".levels"


def matrices(model: ModelProto, folder: Path) -> dict[str, QuantizedMatrix]:
    """By the name that all parts begin with."""
    weights = {one.name: Initializer(one, folder) for graph in every_graph(model.graph) for one in graph.initializer}
    found: dict[str, QuantizedMatrix] = {}
    for node in (node for graph in every_graph(model.graph) for node in graph.node if node.op_type in OPERATORS):
        names = quantized_inputs(node)
        if names[0].endswith(LEVELS) and all(name in weights for name in names):
            matrix = quantized_matrix(node, tuple(weights[name] for name in names))
            found |= {names[0].removesuffix(LEVELS): matrix} if matrix.fits else {}
    return found


def shared_matrices(
    one: Mapping[str, QuantizedMatrix], other: Mapping[str, QuantizedMatrix]
) -> dict[str, tuple[QuantizedMatrix, QuantizedMatrix]]:
    """Those of both graphs that have the same number of rows and columns."""
    pairs = {name: (one[name], other[name]) for name in sorted({*one} & {*other})}
    return {name: (a, b) for name, (a, b) in pairs.items() if (a.rows, a.columns) == (b.rows, b.columns)}


def compare_matrices(graph: str, name: str, one: QuantizedMatrix, other: QuantizedMatrix) -> WeightChange | None:
    """How they differ; None where format and bytes are equal."""
    digests = [tuple(part.digest() for part in side.parts) for side in (one, other)]
    if digests[0] == digests[1] and (one.blocks, one.transposed) == (other.blocks, other.transposed):
        return None
    step = max(1, COUNT // one.columns)
    ranges = [slice(begin, begin + step) for begin in range(0, one.rows, step)]
    pairs = zip(_values(one, ranges), _values(other, ranges), strict=True)
    return WeightChange(graph, name, (digests[0][0], digests[1][0]), *errors(pairs))


def _values(matrix: QuantizedMatrix, ranges: Sequence[slice]) -> Iterator[Values]:
    for rows in matrix.values(ranges):
        yield rows.reshape(-1).astype(np.float64)
