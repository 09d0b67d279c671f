"""Write a quantized bundle's weights as an fp32 checkpoint, which PyTorch runs for comparison with the bundle.

Quantized matrices are dequantized from the bundle; other tensors are the checkpoint's, rounded to the bundle's
precision. Matrices are read and written one at a time, and read as the operators read them, so that an error in packing
or placement shows.
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
    """Norm of a matrix's error over the matrix's norm: of all values and of the worst row."""

    tensor: str
    bits: float
    relative: float
    worst_row: float


def write_dequantized(folder: Path, checkpoint: Checkpoint, precision: str, out: Path) -> list[RoundingError]:
    """Write the fp32 copy of the bundle in `folder` to `out`, and return each quantized matrix's error.

    Args:
        precision: of tensors that the bundle does not quantize: fp32, fp16 or bf16.

    Raises:
        BundleError: a quantized matrix is not in the checkpoint, or has a different shape there.
    """
    places = dict(_places(folder, checkpoint))
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
            if name in places:
                place = places[name]
                (got,) = place.matrix.values([place.rows])
                errors.append(_compared(name, got, raw.astype(np.float32), place.matrix.blocks))
            else:
                got = raw.astype(ROUNDED[precision]).astype(np.float32)
            file.write(np.ascontiguousarray(got, np.float32).data)
    return errors


@dataclass(frozen=True)
class _Place:
    """Rows of a quantized matrix that are one tensor of the checkpoint."""

    matrix: QuantizedMatrix
    rows: slice


def _places(folder: Path, checkpoint: Checkpoint) -> Iterator[tuple[str, _Place]]:
    """Yield each quantized tensor of the checkpoint, and where the bundle has it."""
    for path in (folder / name for name in own_files(folder) if name.endswith(".onnx")):
        model = onnx.load(path, load_external_data=False)
        weights = {tensor.name: Initializer(tensor, path.parent) for tensor in model.graph.initializer}
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
    """Split `language_model.layers.0.mlp.gate_proj+up_proj.weight.levels` into the checkpoint's tensor names."""
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
    total = math.sqrt(difference.sum() / max(own.sum(), 1e-30))
    return RoundingError(name, blocks.bits_per_weight, total, float(rows.max()))


def _other_shape(name: str, expected: object, found: object) -> BundleError:
    return BundleError(
        f"the bundle's {name} has a different shape than the checkpoint's", expected=expected, found=found
    )
