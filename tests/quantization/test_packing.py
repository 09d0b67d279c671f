"""packing: ONNX Runtime's operators read the packed codes, scales and zero points correctly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from builder.quantization.blockwise import Blocks, Quantized, dequantize, quantize
from builder.quantization.packing import lookup_shape, pack, packed_parts, part_shape, parts, unpack, unpacked
from tests.helpers.small_graphs import CONTRIB, Array, drawn

ROWS = 24
FORMATS = [
    pytest.param(Blocks(bits, size, zero_points, "mse"), count, id=f"int{bits}-{size}x{count}{'-zero' * zero_points}")
    for bits in (4, 8)
    for zero_points in (False, True)
    for size, count in ((16, 3), (32, 2), (64, 5), (128, 1))
]
EACH = pytest.mark.parametrize(("blocks", "count"), FORMATS)


def quantized_rows(blocks: Blocks, count: int, rows: int = ROWS) -> Quantized:
    return quantize(drawn(rows, blocks.size * count) + np.float32(0.3), blocks)


def session(node: onnx.NodeProto, inputs: dict[str, int], arrays: dict[str, Array]) -> Any:
    """A single operator with its matrix in initializers, so that nothing unpacks it before."""
    ports = [helper.make_tensor_value_info(name, kind, None) for name, kind in inputs.items()]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph([node], "one", ports, out, initializers)
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def shaped(found: Quantized, blocks: Blocks, columns: int, lookup: bool) -> dict[str, Array]:
    shape = lookup_shape if lookup else part_shape
    packed = packed_parts(found, blocks, "float32")
    return {part: array.reshape(shape(part, blocks, len(found.codes), columns)) for part, array in packed.items()}


def matmul(x: Array, blocks: Blocks, arrays: dict[str, Array], columns: int, accuracy: int) -> Array:
    node = helper.make_node(
        "MatMulNBits",
        ["x", *arrays],
        ["y"],
        domain=CONTRIB,
        K=columns,
        N=ROWS,
        bits=blocks.bits,
        block_size=blocks.size,
        accuracy_level=accuracy,
    )
    y: Array = session(node, {"x": TensorProto.FLOAT}, arrays).run(None, {"x": x})[0]
    return y


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 2, 7, 32])
def test_unpacking_is_the_inverse_of_packing(bits: int, columns: int) -> None:
    values = np.random.default_rng(columns).integers(0, 1 << bits, (5, columns), np.uint8)
    packed = pack(values, bits)
    assert packed.shape == (5, -(-columns * bits // 8))
    np.testing.assert_array_equal(unpack(packed, bits, columns), values)


def test_the_first_of_two_codes_is_in_the_low_nibble() -> None:
    assert pack(np.array([[1, 2, 15]], np.uint8), 4).tolist() == [[0x21, 0x0F]]


@EACH
def test_each_part_has_the_bytes_of_its_declared_shape(blocks: Blocks, count: int) -> None:
    columns = blocks.size * count
    packed = packed_parts(quantized_rows(blocks, count), blocks, "float16")
    assert tuple(packed) == parts(blocks)
    for part, array in packed.items():
        for shape in (part_shape, lookup_shape):
            assert array.size == np.prod(shape(part, blocks, ROWS, columns))
        assert array.dtype == ("float16" if part == "scales" else "uint8")


@EACH
@pytest.mark.parametrize("lookup", [False, True])
def test_what_was_packed_is_unpacked_again(blocks: Blocks, count: int, lookup: bool) -> None:
    found, columns = quantized_rows(blocks, count), blocks.size * count
    arrays = shaped(found, blocks, columns, lookup)
    again = unpacked(arrays["levels"], arrays["scales"], arrays.get("zero_points"), blocks, columns)
    for got, want in zip(vars(again).values(), vars(found).values(), strict=True):
        np.testing.assert_array_equal(got, want)


@EACH
@pytest.mark.parametrize("batch", [1, 3])
def test_a_fp32_matmul_equals_that_of_the_dequantized_matrix(blocks: Blocks, count: int, batch: int) -> None:
    found, columns = quantized_rows(blocks, count), blocks.size * count
    x = drawn(batch, columns, seed=1)
    got = matmul(x, blocks, shaped(found, blocks, columns, lookup=False), columns, accuracy=1)
    want = x.astype(np.float64) @ dequantize(found).T
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@EACH
@pytest.mark.parametrize("batch", [1, 3])
def test_an_int8_matmul_is_close_to_it(blocks: Blocks, count: int, batch: int) -> None:
    found, columns = quantized_rows(blocks, count), blocks.size * count
    x = drawn(batch, columns, seed=1)
    got = matmul(x, blocks, shaped(found, blocks, columns, lookup=False), columns, accuracy=4)
    want = x.astype(np.float64) @ dequantize(found).T
    assert np.abs(got - want).max() < 0.03 * want.std() + 0.02


@EACH
def test_a_lookup_of_the_same_bytes_gives_the_dequantized_rows(blocks: Blocks, count: int) -> None:
    found, columns = quantized_rows(blocks, count), blocks.size * count
    arrays = shaped(found, blocks, columns, lookup=True)
    node = helper.make_node(
        "GatherBlockQuantized",
        ["levels", "ids", *list(arrays)[1:]],
        ["y"],
        domain=CONTRIB,
        bits=blocks.bits,
        block_size=blocks.size,
        gather_axis=0,
        quantize_axis=1,
    )
    ids = np.array([[0, 23, 5], [5, 1, 0]], np.int64)
    got = session(node, {"ids": TensorProto.INT64}, arrays).run(None, {"ids": ids})[0]
    np.testing.assert_allclose(got, dequantize(found)[ids], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("part", ["levels", "scales", "zero_points"])
def test_a_matmul_shows_a_wrong_element_of_each_part(part: str) -> None:
    """A control: the comparison above can fail."""
    blocks = Blocks(4, 32, zero_points=True)
    found, x = quantized_rows(blocks, 3), drawn(1, 96, seed=1)
    broken = {
        "levels": replace(found, codes=found.codes ^ (np.arange(96) == 7).astype(np.uint8)),
        "scales": replace(found, scales=found.scales * np.array([1, 1.01, 1], np.float32)),
        "zero_points": replace(found, zeros=found.zeros ^ np.array([0, 0, 1], np.uint8)),
    }[part]
    got = matmul(x, blocks, shaped(broken, blocks, 96, lookup=False), 96, accuracy=1)
    want = x.astype(np.float64) @ dequantize(found).T
    assert np.abs(got - want).max() > 1e-3
