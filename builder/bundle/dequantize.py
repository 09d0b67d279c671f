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

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx

from builder.bundle.initializer import Initializer
from builder.bundle.layout import own_files
from builder.bundle.quantized_matrix import OPERATORS, QuantizedMatrix, quantized_inputs, quantized_matrix
from builder.checkpoint.load import Checkpoint
from builder.checkpoint.safetensors import SINGLE, map_bytes
from builder.checkpoint.tensors import EMBEDDINGS, LM_HEAD
from builder.quantization.blockwise import Blocks
from builder.util.errors import BundleError

Matrix = npt.NDArray[np.float32]
NUMPY = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
ROUNDED = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}


@dataclass(frozen=True)
class RoundingError:
    """Of one matrix: the norm of the error over the matrix's own, of the whole and of the worst row of blocks."""

    tensor: str
    bits: float
    relative: float
    worst_row: float


def write_dequantized(folder: Path, checkpoint: Checkpoint, precision: str, out: Path) -> list[RoundingError]:
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
                place = found[name]
                (got,) = place.matrix.values([place.rows])
                errors.append(_compared(name, got, raw.astype(np.float32), place.matrix.blocks))
            else:
                got = raw.astype(ROUNDED[precision]).astype(np.float32)
            file.write(np.ascontiguousarray(got, np.float32).data)
    return errors


@dataclass(frozen=True)
class _Place:
    """Rows of a matrix that a node reads."""

    matrix: QuantizedMatrix
    rows: slice


def _places(folder: Path, checkpoint: Checkpoint) -> Iterator[tuple[str, _Place]]:
    """Every quantized matrix of the checkpoint, and where the bundle has it."""
    for path in (folder / name for name in own_files(folder) if name.endswith(".onnx")):
        model = onnx.load(path, load_external_data=False)
        weights = {one.name: Initializer(one, path.parent) for one in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type not in OPERATORS:
                continue
            names = quantized_inputs(node)
            codes, begin = names[0], 0
            matrix = quantized_matrix(node, tuple(weights[name] for name in names))
            for name in _tensors(codes, checkpoint):
                if name not in checkpoint.tensors:
                    raise BundleError(
                        f"{path.name} quantizes a matrix that the checkpoint does not have",
                        expected="initializers named after the checkpoint's tensors",
                        found=codes,
                    )
                end = begin + checkpoint.tensors[name].shape[0]
                yield name, _Place(matrix, slice(begin, end))
                begin = end
            if begin != matrix.rows:
                raise _other_shape(codes.removesuffix(".levels"), begin, matrix.rows)


def _tensors(codes: str, checkpoint: Checkpoint) -> Iterator[str]:
    """`language_model.layers.0.mlp.gate_proj+up_proj.weight.levels` → the checkpoint's names of both."""
    stem, *_ = codes.rpartition(".levels")
    before, _, after = stem.rpartition(".")
    path, _, names = before.rpartition(".")
    for name in names.split("+"):
        full = f"{path}.{name}.{after}" if path else f"{name}.{after}"
        if full in (LM_HEAD, "embed_tokens.weight"):
            yield LM_HEAD if full == LM_HEAD and LM_HEAD in checkpoint.tensors else EMBEDDINGS
        else:
            yield f"model.{full}"


def _compared(name: str, got: Matrix, want: Matrix, blocks: Blocks) -> RoundingError:
    if got.shape != want.shape:
        raise _other_shape(name, list(want.shape), list(got.shape))
    difference = np.square(got - want, dtype=np.float64).sum(1)
    own = np.square(want, dtype=np.float64).sum(1)
    rows = np.sqrt(difference / np.maximum(own, 1e-30))
    whole = math.sqrt(difference.sum() / max(own.sum(), 1e-30))
    return RoundingError(name, blocks.bits_per_weight, whole, float(rows.max()))


def _other_shape(name: str, expected: object, found: object) -> BundleError:
    return BundleError(f"the bundle's {name} is of another shape than the checkpoint's", expected=expected, found=found)
