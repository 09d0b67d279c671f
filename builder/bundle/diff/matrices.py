"""In: two graphs with quantized matrices. Out: how far apart the matrices are that an operator reads in both.

Guaranteed: rows are dequantized a few at a time, whatever the bits, the block size and the operator are on either side;
parts that do not fit together are no matrix, and are compared as the initializers that they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import tensor_dtype_to_np_dtype

from builder.bundle.dequantize import OPERATORS, TURNED, quantized_inputs
from builder.bundle.diff.weights import COUNT, Weight, WeightChange, errors
from builder.graph.introspection import every_graph
from builder.quantization.blockwise import Blocks, dequantize
from builder.quantization.packing import unpacked

LEVELS = ".levels"


@dataclass(frozen=True)
class Matrix:
    """[rows, columns] in `blocks`: levels, scales and, where the format has them, zero points, of a graph in `folder`.

    Args:
        turned: levels are [columns, rows], one byte each. The middle one is zero, as builds write them; another zero
            point is another constant, which `compare_graphs` tells.
    """

    parts: tuple[TensorProto, ...]
    blocks: Blocks
    rows: int
    columns: int
    turned: bool
    folder: Path

    @property
    def fits(self) -> bool:
        """Whether the parts are as long as the format makes them."""
        if self.blocks.bits not in (4, 8) or min(self.blocks.size, self.rows, self.columns) < 1:
            return False
        if self.columns % self.blocks.size:
            return False
        count = self.columns // self.blocks.size
        lengths = [self.columns * self.blocks.bits // 8, count, -(-count * self.blocks.bits // 8)]
        found = [math.prod(part.dims) for part in self.parts]
        return found == [self.rows * length for length in lengths[: len(found)]]

    def values(self, step: int) -> Iterator[npt.NDArray[np.float64]]:
        """Its values, `step` rows at a time."""
        levels, *others = (_array(part, self.folder) for part in self.parts)
        levels = levels.reshape(self.columns, self.rows).T if self.turned else levels.reshape(self.rows, -1)
        scales, *zeros = (one.reshape(self.rows, -1) for one in others)
        for begin in range(0, self.rows, step):
            part = slice(begin, begin + step)
            zero = zeros[0][part] if zeros else None
            few = unpacked(np.ascontiguousarray(levels[part]), scales[part], zero, self.blocks, self.columns)
            yield dequantize(few).reshape(-1).astype(np.float64)


def matrices(model: ModelProto, folder: Path) -> dict[str, Matrix]:
    """By the name that all parts begin with."""
    tensors = {one.name: one for graph in every_graph(model.graph) for one in graph.initializer}
    found: dict[str, Matrix] = {}
    for node in (node for graph in every_graph(model.graph) for node in graph.node if node.op_type in OPERATORS):
        names = quantized_inputs(node)
        if names[0].endswith(LEVELS) and all(name in tensors for name in names):
            matrix = _matrix(node, tuple(tensors[name] for name in names), folder)
            found |= {names[0].removesuffix(LEVELS): matrix} if matrix.fits else {}
    return found


def shared_matrices(one: Mapping[str, Matrix], other: Mapping[str, Matrix]) -> dict[str, tuple[Matrix, Matrix]]:
    """Those of both graphs that have the same number of rows and columns."""
    pairs = {name: (one[name], other[name]) for name in sorted({*one} & {*other})}
    return {name: (a, b) for name, (a, b) in pairs.items() if (a.rows, a.columns) == (b.rows, b.columns)}


def compare_matrices(graph: str, name: str, one: Matrix, other: Matrix) -> WeightChange | None:
    """How they differ; None where format and bytes are equal."""
    digests = [tuple(Weight(part, side.folder).digest() for part in side.parts) for side in (one, other)]
    if digests[0] == digests[1] and (one.blocks, one.turned) == (other.blocks, other.turned):
        return None
    step = max(1, COUNT // one.columns)
    apart = errors(zip(one.values(step), other.values(step), strict=True))
    return WeightChange(graph, name, (digests[0][0], digests[1][0]), *apart)


def _matrix(node: NodeProto, parts: tuple[TensorProto, ...], folder: Path) -> Matrix:
    levels = parts[0].dims
    if node.op_type == TURNED:
        return Matrix(parts, Blocks(8, levels[0]), levels[1], levels[0], True, folder)
    facts = {one.name: one.i for one in node.attribute}
    blocks = Blocks(facts.get("bits", 4), facts.get("block_size", 0), len(parts) > 2)
    columns = math.prod(levels[1:]) * 8 // (blocks.bits or 1)
    return Matrix(parts, blocks, levels[0], columns, False, folder)


def _array(tensor: TensorProto, folder: Path) -> npt.NDArray[Any]:
    """Its values on the disk, or those in the graph."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    facts = {entry.key: entry.value for entry in tensor.external_data}
    kind, offset = tensor_dtype_to_np_dtype(tensor.data_type), int(facts.get("offset", "0"))
    return np.memmap(folder / facts["location"], kind, "r", offset, tuple(tensor.dims))
