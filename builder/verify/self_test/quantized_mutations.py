"""Break the quantized weights of a bundle, like builder/verify/self_test/mutations.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from builder.checkpoint.parts import DECODER, VISION
from builder.quantization.packing import pack, unpack
from builder.verify.self_test.edits import (
    DOWN,
    InapplicableError,
    constant,
    edited,
    need_layer,
    numbers,
    reader,
    weight,
)


def scales_shifted(bundle: Path, target: str, layer: int = 1) -> None:
    """Give each block of a down projection the scale of the next block."""
    with edited(bundle, DECODER) as graph:
        node = _quantized(graph, layer)
        scales = node.inputs[2]
        assert scales is not None
        values = np.roll(numbers(scales), -1)
        scales.const_value = ir.tensor(values, name=scales.name)


def zero_points_shifted(bundle: Path, target: str, layer: int = 1) -> None:
    """Raise the zero points of a down projection by one code."""
    with edited(bundle, DECODER) as graph:
        node = _quantized(graph, layer)
        bits = node.attributes.get_int("bits", 0)
        rows, blocks = node.inputs[2].shape.numpy()  # type: ignore[union-attr]
        middle = np.full((rows, blocks), (1 << (bits - 1)) + 1, np.uint8)
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            middle = unpack(numbers(node.inputs[3]).reshape(rows, -1), bits, blocks) + 1
        zeros = constant(graph, "zero_points", pack(middle, bits))
        node.resize_inputs(max(4, len(node.inputs)))
        node.replace_input_with(3, zeros)


def nibbles_swapped(bundle: Path, target: str, layer: int = 1) -> None:
    """Swap the two 4-bit codes in each byte of a down projection."""
    with edited(bundle, DECODER) as graph:
        node = _quantized(graph, layer)
        if node.attributes.get_int("bits", 0) != 4:
            raise InapplicableError("each code has its own byte")
        codes = node.inputs[1]
        assert codes is not None
        values = numbers(codes)
        codes.const_value = ir.tensor((values >> 4) | (values << 4), name=codes.name)


def int8_zero_point_shifted(bundle: Path, target: str, block: int = 1) -> None:
    """Raise the zero point of a matrix with int8 activations by one code, in one vision block.

    Breaks the fp32 copy (builder/verify/graphs/fp32_copy.py), which dequantizes the matrix.
    """
    with edited(bundle, VISION) as graph:
        nodes = [node for node in graph if node.op_type == "DequantizeLinear"]
        nodes = [node for node in nodes if f"blocks.{block}." in str(node.inputs[0].name)]  # type: ignore[union-attr]
        if not nodes:
            raise InapplicableError("no activations are quantized")
        zeros = nodes[0].inputs[2]
        assert zeros is not None
        nodes[0].replace_input_with(2, constant(graph, "zero_point", numbers(zeros) + np.uint8(1)))


def _quantized(graph: ir.Graph, layer: int) -> ir.Node:
    """Return the matmul with a decoder layer's quantized down projection."""
    need_layer(graph, layer)
    node = reader(weight(graph, DOWN.format(layer)))
    if node.op_type != "MatMulNBits":
        raise InapplicableError("its weights are not quantized")
    return node
