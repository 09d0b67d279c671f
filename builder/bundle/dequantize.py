"""The checkpoint that a bundle's weights are: what PyTorch is given when it is compared with a quantized graph.

In: a bundle and the checkpoint that it was made from. Out: a checkpoint folder in fp32 whose matrices are those of
the bundle, dequantized, and whose other tensors are the checkpoint's, rounded as the bundle's precision rounds them;
and how far each matrix is from the checkpoint's. Guaranteed: read and written a matrix at a time; the parts of a
matrix are read as the operators read them, so that a part that is packed or placed wrongly is a wrong matrix here.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from builder.bundle.layout import own_files
from builder.checkpoint.load import Checkpoint
from builder.checkpoint.safetensors import SINGLE, map_bytes
from builder.checkpoint.tensors import EMBEDDINGS, LM_HEAD
from builder.quantization.blockwise import Blocks, Quantized, dequantize
from builder.quantization.packing import unpacked
from builder.util.errors import BundleError

Matrix = npt.NDArray[np.float32]
NUMPY = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
ROUNDED = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}
TURNED = "DynamicQuantizeMatMul"  # its rows are the checkpoint's columns, and a column has one scale
OPERATORS = ("MatMulNBits", "GatherBlockQuantized", TURNED)


@dataclass(frozen=True)
class WeightError:
    """Of one matrix: the norm of the error over the matrix's own, of the whole and of the worst row of blocks."""

    tensor: str
    bits: float
    relative: float
    worst_row: float


def write_dequantized(folder: Path, checkpoint: Checkpoint, precision: str, out: Path) -> list[WeightError]:
    """Writes the checkpoint that the bundle in `folder` is into `out`.

    Args:
        precision: of what the bundle does not quantize.

    Raises:
        BundleError: a quantized matrix of the bundle is no matrix of the checkpoint, or of another shape.
    """
    found = dict(_places(folder, checkpoint))
    out.mkdir(parents=True, exist_ok=True)
    for name in checkpoint.files:
        if not name.endswith(".safetensors") and "/" not in name and (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, out / name)
    (out / "model.safetensors.index.json").unlink(missing_ok=True)
    config = {**checkpoint.config, "dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    header, offset = {}, 0
    for name, tensor in checkpoint.tensors.items():
        size = 4 * math.prod(tensor.shape)
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    errors = []
    with (out / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in checkpoint.tensors.items():
            raw = np.asarray(map_bytes(checkpoint.folder, tensor)).view(NUMPY[tensor.dtype]).reshape(tensor.shape)
            if name in found:
                got = found[name].matrix()
                errors.append(_compared(name, got, raw.astype(np.float32), found[name].blocks))
            else:
                got = raw.astype(ROUNDED[precision]).astype(np.float32)
            file.write(np.ascontiguousarray(got, np.float32).data)
    return errors


@dataclass(frozen=True)
class _Place:
    """Rows `begin` … `end` of the matrix that a node reads."""

    folder: Path
    model: ModelProto
    node: NodeProto
    begin: int
    end: int

    @property
    def blocks(self) -> Blocks:
        if self.node.op_type == TURNED:
            levels = self.node.input[1]
            return Blocks(8, next(one.dims[0] for one in self.model.graph.initializer if one.name == levels))
        attributes = {one.name: one.i for one in self.node.attribute}
        return Blocks(attributes["bits"], attributes["block_size"], len(quantized_inputs(self.node)) > 2)

    def matrix(self) -> Matrix:
        """fp32 [rows, columns]."""
        turned = self.node.op_type == TURNED
        part = (0, None) if turned else (self.begin, self.end)
        levels, scales, *zeros = (_rows(self.folder, self.model, name, *part) for name in quantized_inputs(self.node))
        if turned:
            levels, scales = levels.T[self.begin : self.end], scales[self.begin : self.end]
        columns = math.prod(levels.shape[1:]) * 8 // self.blocks.bits
        quantized: Quantized = unpacked(levels, scales, zeros[0] if zeros else None, self.blocks, columns)
        return dequantize(quantized)


def _places(folder: Path, checkpoint: Checkpoint) -> Iterator[tuple[str, _Place]]:
    """Every quantized matrix of the checkpoint, and where the bundle has it."""
    for path in (folder / name for name in own_files(folder) if name.endswith(".onnx")):
        model = onnx.load(path, load_external_data=False)
        for node in model.graph.node:
            if node.op_type not in OPERATORS:
                continue
            levels = quantized_inputs(node)[0]
            begin = 0
            for name in _tensors(levels, checkpoint):
                if name not in checkpoint.tensors:
                    raise BundleError(
                        f"{path.name} quantizes a matrix that the checkpoint does not have",
                        expected="initializers named after the checkpoint's tensors",
                        found=levels,
                    )
                end = begin + checkpoint.tensors[name].shape[0]
                yield name, _Place(path.parent, model, node, begin, end)
                begin = end
            (shape,) = [one.dims for one in model.graph.initializer if one.name == levels]
            rows = shape[1 if node.op_type == TURNED else 0]
            if begin != rows:
                raise _other_shape(levels.removesuffix(".levels"), begin, rows)


def quantized_inputs(node: NodeProto) -> list[str]:
    """Levels, scales and, where there are, zero points."""
    if node.op_type == "GatherBlockQuantized":
        return [node.input[0], *node.input[2:4]]
    if node.op_type == TURNED:
        return list(node.input[1:3])
    return [name for name in node.input[1:4] if name]


def _tensors(levels: str, checkpoint: Checkpoint) -> Iterator[str]:
    """`language_model.layers.0.mlp.gate_proj+up_proj.weight.levels` → the checkpoint's names of both."""
    stem, *_ = levels.rpartition(".levels")
    before, _, after = stem.rpartition(".")
    path, _, names = before.rpartition(".")
    for name in names.split("+"):
        full = f"{path}.{name}.{after}" if path else f"{name}.{after}"
        if full in (LM_HEAD, "embed_tokens.weight"):
            yield LM_HEAD if full == LM_HEAD and LM_HEAD in checkpoint.tensors else EMBEDDINGS
        else:
            yield f"model.{full}"


def _rows(folder: Path, model: ModelProto, name: str, begin: int, end: int | None) -> npt.NDArray[Any]:
    """Those rows of an initializer (to the last, where `end` is None), read from its data file."""
    tensor: TensorProto = next(one for one in model.graph.initializer if one.name == name)
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)[begin:end]
    count = (tensor.dims[0] if end is None else end) - begin
    entries = {one.key: one.value for one in tensor.external_data}
    dtype = helper_dtype(tensor)
    width = math.prod(tensor.dims[1:])
    start = int(entries.get("offset", 0)) + begin * width * dtype.itemsize
    flat = np.fromfile(folder / entries["location"], dtype, count * width, offset=start)
    return flat.reshape(count, *tensor.dims[1:])


def helper_dtype(tensor: TensorProto) -> np.dtype[Any]:
    """numpy's type of an initializer."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))


def _compared(name: str, got: Matrix, want: Matrix, blocks: Blocks) -> WeightError:
    if got.shape != want.shape:
        raise _other_shape(name, list(want.shape), list(got.shape))
    difference = np.square(got - want, dtype=np.float64).sum(1)
    own = np.square(want, dtype=np.float64).sum(1)
    rows = np.sqrt(difference / np.maximum(own, 1e-30))
    whole = math.sqrt(difference.sum() / max(own.sum(), 1e-30))
    return WeightError(name, blocks.bits_per_weight, whole, float(rows.max()))


def _other_shape(name: str, expected: object, found: object) -> BundleError:
    return BundleError(f"the bundle's {name} is of another shape than the checkpoint's", expected=expected, found=found)
