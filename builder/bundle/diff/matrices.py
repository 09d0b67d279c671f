"""Measure how far quantized matrices are apart that both graphs have.

Rows are dequantized a few at a time; bits, block size and operator may differ between the graphs. Parts that do not fit
together are not a matrix, and are compared as initializers.
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

CODES = ".levels"  # suffix of initializers with codes


def matrices(model: ModelProto, folder: Path) -> dict[str, QuantizedMatrix]:
    """Map the common prefix of each matrix's parts to the matrix."""
    weights = {
        tensor.name: Initializer(tensor, folder) for graph in every_graph(model.graph) for tensor in graph.initializer
    }
    found: dict[str, QuantizedMatrix] = {}
    for node in (node for graph in every_graph(model.graph) for node in graph.node if node.op_type in OPERATORS):
        names = quantized_inputs(node)
        if names[0].endswith(CODES) and all(name in weights for name in names):
            matrix = quantized_matrix(node, tuple(weights[name] for name in names))
            found |= {names[0].removesuffix(CODES): matrix} if matrix.fits else {}
    return found


def shared_matrices(
    first: Mapping[str, QuantizedMatrix], second: Mapping[str, QuantizedMatrix]
) -> dict[str, tuple[QuantizedMatrix, QuantizedMatrix]]:
    """Pair the matrices of both graphs that have the same number of rows and columns."""
    pairs = {name: (first[name], second[name]) for name in sorted({*first} & {*second})}
    return {name: (a, b) for name, (a, b) in pairs.items() if (a.rows, a.columns) == (b.rows, b.columns)}


def compare_matrices(graph: str, name: str, first: QuantizedMatrix, second: QuantizedMatrix) -> WeightChange | None:
    """Return how the matrices differ; None where format and bytes are equal."""
    digests = [tuple(part.digest() for part in side.parts) for side in (first, second)]
    if digests[0] == digests[1] and (first.blocks, first.transposed) == (second.blocks, second.transposed):
        return None
    step = max(1, COUNT // first.columns)
    ranges = [slice(begin, begin + step) for begin in range(0, first.rows, step)]
    pairs = zip(_values(first, ranges), _values(second, ranges), strict=True)
    return WeightChange(graph, name, (digests[0][0], digests[1][0]), *errors(pairs))


def _values(matrix: QuantizedMatrix, ranges: Sequence[slice]) -> Iterator[Values]:
    for rows in matrix.values(ranges):
        yield rows.reshape(-1).astype(np.float64)
