"""Read the quantized matrices of a bundle's graphs as their operators do, for all bits and block sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from builder.bundle.initializer import Initializer
from builder.quantization.blockwise import Blocks, dequantize
from builder.quantization.packing import unpacked

TRANSPOSED = "DynamicQuantizeMatMul"  # codes are [columns, rows], one scale per row of the checkpoint's matrix
OPERATORS = ("MatMulNBits", "GatherBlockQuantized", TRANSPOSED)


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantized matrix, [rows, columns] in the checkpoint.

    Args:
        parts: codes, scales and, where the format has them, zero points.
        transposed: codes are [columns, rows], one byte each, and the zero point is the middle code, as builds write it;
            another zero point is a changed constant, which `builder.bundle.diff.graphs.compare_graphs` reports.
    """

    parts: tuple[Initializer, ...]
    blocks: Blocks
    rows: int
    columns: int
    transposed: bool

    @property
    def fits(self) -> bool:
        """Whether the parts have the lengths that the format requires."""
        if self.blocks.bits not in (4, 8) or min(self.blocks.size, self.rows, self.columns) < 1:
            return False
        if self.columns % self.blocks.size:
            return False
        count = self.columns // self.blocks.size
        lengths = [self.columns * self.blocks.bits // 8, count, -(-count * self.blocks.bits // 8)]
        actual = [math.prod(part.tensor.dims) for part in self.parts]
        return actual == [self.rows * length for length in lengths[: len(actual)]]

    def values(self, ranges: Iterable[slice]) -> Iterator[npt.NDArray[np.float32]]:
        """Yield each range of rows dequantized, fp32 [rows, columns]."""
        codes, *others = (part.array() for part in self.parts)
        codes = codes.reshape(self.columns, self.rows).T if self.transposed else codes.reshape(self.rows, -1)
        scales, *zeros = (part.reshape(self.rows, -1) for part in others)
        for rows in ranges:
            zero = zeros[0][rows] if zeros else None
            few = unpacked(np.ascontiguousarray(codes[rows]), scales[rows], zero, self.blocks, self.columns)
            yield dequantize(few)


def quantized_matrix(node: NodeProto, parts: tuple[Initializer, ...]) -> QuantizedMatrix:
    """Return the matrix that a node of `OPERATORS` reads; `parts` are its `quantized_inputs`."""
    codes = parts[0].tensor.dims
    if node.op_type == TRANSPOSED:
        return QuantizedMatrix(parts, Blocks(8, codes[0]), codes[1], codes[0], transposed=True)
    facts = {attribute.name: attribute.i for attribute in node.attribute}
    blocks = Blocks(facts.get("bits", 4), facts.get("block_size", 0), len(parts) > 2)
    columns = math.prod(codes[1:]) * 8 // (blocks.bits or 1)
    return QuantizedMatrix(parts, blocks, codes[0], columns, transposed=False)


def quantized_inputs(node: NodeProto) -> list[str]:
    """Names of a node's codes, scales and, where present, zero points."""
    if node.op_type == "GatherBlockQuantized":
        return [node.input[0], *node.input[2:4]]
    if node.op_type == TRANSPOSED:
        return list(node.input[1:3])
    return [name for name in node.input[1:4] if name]
