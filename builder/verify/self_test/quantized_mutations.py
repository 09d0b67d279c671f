"""Ways to break what a bundle stores in few bits; contracts are those of builder/verify/self_test/mutations.py."""

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
    """Each block of a down projection has the scale of the next one."""
    with edited(bundle, DECODER) as graph:
        node = _quantized(graph, layer)
        scales = node.inputs[2]
        assert scales is not None
        values = np.roll(numbers(scales), -1)
        scales.const_value = ir.tensor(values, name=scales.name)


def zero_points_shifted(bundle: Path, target: str, layer: int = 1) -> None:
    """Zero is one level higher in a down projection."""
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
    """The first of two levels in the higher four bits, in a down projection."""
    with edited(bundle, DECODER) as graph:
        node = _quantized(graph, layer)
        if node.attributes.get_int("bits", 0) != 4:
            raise InapplicableError("a level has a byte of its own")
        levels = node.inputs[1]
        assert levels is not None
        values = numbers(levels)
        levels.const_value = ir.tensor((values >> 4) | (values << 4), name=levels.name)


def whole_zero_point_shifted(bundle: Path, target: str, block: int = 1) -> None:
    """Zero is one level higher in a matrix of one vision block that is multiplied as whole numbers.

    What is compared with PyTorch dequantizes it (builder/verify/graphs/fp32_copy.py), from the zero point of the
    product.
    """
    with edited(bundle, VISION) as graph:
        ours = [node for node in graph if node.op_type == "DequantizeLinear"]
        found = [node for node in ours if f"blocks.{block}." in str(node.inputs[0].name)]  # type: ignore[union-attr]
        if not found:
            raise InapplicableError("no activations are rounded")
        zeros = found[0].inputs[2]
        assert zeros is not None
        found[0].replace_input_with(2, constant(graph, "zero_point", numbers(zeros) + np.uint8(1)))


def _quantized(graph: ir.Graph, layer: int) -> ir.Node:
    """The product with a decoder layer's down projection."""
    need_layer(graph, layer)
    node = reader(weight(graph, DOWN.format(layer)))
    if node.op_type != "MatMulNBits":
        raise InapplicableError("its weights are not quantized")
    return node
