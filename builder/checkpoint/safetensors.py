"""Read the headers of safetensors files (https://github.com/huggingface/safetensors#format).

Guarantees: every `Tensor` is inside its file, no two share bytes or a name, and the index file, if there is one, agrees
with the headers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
import numpy.typing as npt

from builder.util.errors import CheckpointError, UnsafeError, UnsupportedError
from builder.util.json_files import parse_object, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NUMPY_TYPES: Mapping[str, type] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
ITEM_BYTES = {name: np.dtype(kind).itemsize for name, kind in NUMPY_TYPES.items()}
# The reference implementation allows six times as much; the header of the largest dense model has a hundredth of this.
MAX_HEADER_BYTES = 16 * 2**20
MAX_AXES, MAX_NUMBER = 8, 2**63 - 1
MAX_NAME, MAX_PATH = 255, 1024  # characters; operating systems refuse longer names, with errors that differ


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, and the location of its bytes.

    Args:
        name: as in the file, e.g. `model.language_model.norm.weight`.
        file: the safetensors file, relative to the checkpoint folder.
        dtype: `"BF16"`, `"F16"` or `"F32"`.
        shape: row-major.
        offset: of the first byte, from the start of the file.
        nbytes: its length in bytes.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def weight_files(folder: Path, names: Collection[str]) -> tuple[str, ...]:
    """Return the checkpoint's safetensors files, sorted, relative to `folder`.

    Args:
        folder: with the index file, if `names` has one.
        names: the checkpoint's files (those of a hub repository need not be in `folder` yet).

    Raises:
        CheckpointError: neither `model.safetensors` nor an index, or two sets of weights.
        UnsafeError: the index names a file outside the folder, or one that is not safetensors.
    """
    if INDEX not in names:
        if SINGLE not in names:
            shards = sorted(name for name in names if name.endswith(".safetensors"))
            raise CheckpointError(
                f"no weights in {folder}: neither {SINGLE} nor {INDEX}",
                expected=f"{SINGLE}, or {INDEX} with its shards",
                found=", ".join(shards) or "no safetensors file",
                next="save the model again with save_pretrained()",
            )
        return (SINGLE,)
    files = tuple(sorted(set(read_weight_map(folder / INDEX).values())))
    if SINGLE in names and SINGLE not in files:
        raise CheckpointError(
            f"two sets of weights in {folder}",
            expected=f"{SINGLE}, or {INDEX} with its shards",
            found="both",
            next="remove the set that should not be used",
        )
    return files


def read_weight_map(path: Path) -> dict[str, str]:
    """Read tensor name → file from an index file.

    Raises:
        CheckpointError: no `weight_map` of strings.
        UnsafeError: a file outside the folder, or one that is not safetensors.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{path} has no "weight_map"', expected="tensor name → file name")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file:
            raise CheckpointError(f"{path.name}: the file of {tensor} is not a file name", found=file)
        if len(file) > MAX_PATH or max(map(len, file.split("/"))) > MAX_NAME:
            raise CheckpointError(
                f"{path.name}: the file name of {tensor} is too long",
                expected=f"at most {MAX_NAME} characters",
                found=file,
            )
        if leaves_folder(file):
            raise UnsafeError(
                f"{path.name}: the file of {tensor} is outside the checkpoint",
                expected="a name inside the folder",
                found=file,
            )
        if not file.endswith(".safetensors"):
            raise UnsafeError(
                f"{path.name}: the file of {tensor} is not safetensors", expected="*.safetensors", found=file
            )
    return dict(weight_map)


def leaves_folder(name: str) -> bool:
    """Return whether a relative file name can leave its folder, on any operating system."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or any(mark in name for mark in "\\:\0")


def index_tensors(folder: Path, files: Collection[str]) -> dict[str, Tensor]:
    """Return every tensor of `files`, by name.

    Raises:
        CheckpointError: a file is missing, truncated or malformed, a tensor is in two files, or the index is wrong.
        UnsupportedError: quantized weights.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_header(folder, file).items():
            if name in tensors:
                raise CheckpointError(f"{name} is in two files", found=f"{tensors[name].file} and {file}")
            tensors[name] = tensor
    if (folder / INDEX).is_file():
        for name, file in read_weight_map(folder / INDEX).items():
            if name not in tensors:
                raise CheckpointError(
                    f"{INDEX} names {name}, which no file holds",
                    expected=f"{name} in {file}",
                    found="nothing",
                )
            if tensors[name].file != file:
                raise CheckpointError(
                    f"{INDEX} is wrong about {name}", expected=f"in {file}", found=f"in {tensors[name].file}"
                )
    return tensors


def map_bytes(folder: Path, tensor: Tensor) -> npt.NDArray[np.uint8]:
    """Map the bytes of a tensor into memory, read-only: uint8 [nbytes]."""
    if tensor.nbytes == 0:
        return np.zeros(0, np.uint8)
    return np.memmap(folder / tensor.file, np.uint8, "r", tensor.offset, (tensor.nbytes,))


def read_header(folder: Path, file: str) -> dict[str, Tensor]:
    """Read the header of a safetensors file.

    Raises:
        CheckpointError: the file is missing or truncated, or its header is malformed.
        UnsupportedError: a tensor of an integer or 8-bit float type.
    """
    path = folder / file
    if not path.is_file():
        raise CheckpointError(
            f"{file} is missing from {folder}",
            expected=f"a file {file}, which {INDEX} names",
            next="download the checkpoint again; complete files are not fetched again",
        )
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                _truncated(path, f"a header of {length} bytes", f"{size} bytes in all")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"the header of {path} is too large",
                    expected=f"at most {MAX_HEADER_BYTES} bytes",
                    found=f"{length} bytes",
                )
            header = parse_object(stream.read(length), f"the header of {path}", unique=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read", found=error) from error
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = [_entry(path, file, name, entry, start) for name, entry in header.items()]
    _check_layout(path, tensors, start, size)
    return {tensor.name: tensor for tensor in tensors}


def _entry(path: Path, file: str, name: str, entry: Any, start: int) -> Tensor:
    try:
        dtype, shape, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        # Without limits, the product of a shape's axes can take hours, and have too many digits to print.
        valid = len(shape) <= MAX_AXES and all(
            type(number) is int and 0 <= number <= MAX_NUMBER for number in (*shape, begin, end)
        )
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise CheckpointError(f"{path}: the header's entry for {name} is malformed", found=entry)
    if dtype not in ITEM_BYTES:
        _refuse_dtype(file, name, dtype)
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != nbytes:
        raise CheckpointError(
            f"{file}: {name} has the wrong number of bytes",
            expected=f"{nbytes} ({dtype}, shape {list(shape)})",
            found=end - begin,
        )
    return Tensor(name, file, dtype, shape, start + begin, nbytes)


def _refuse_dtype(file: str, name: str, dtype: str) -> NoReturn:
    what = f"{file}: {name} is stored as {dtype}"
    if dtype.startswith(("F8_", "F6_", "F4", "I", "U", "BOOL")):
        raise UnsupportedError(
            f"{what}: a quantized checkpoint",
            expected="BF16, F16 or F32",
            found=dtype,
            next="build from the checkpoint that it was quantized from",
        )
    raise CheckpointError(what, expected="BF16, F16 or F32", found=dtype)


def _check_layout(path: Path, tensors: list[Tensor], start: int, size: int) -> None:
    """Check that tensors fill the file without overlaps, holes or trailing bytes, as the format requires."""
    at = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset + tensor.nbytes > size:
            _truncated(path, f"{tensor.name} up to byte {tensor.offset + tensor.nbytes}", f"{size} bytes")
        if tensor.offset != at:
            fault = "overlaps another tensor" if tensor.offset < at else "follows a hole"
            raise CheckpointError(
                f"{path}: {tensor.name} {fault}",
                expected=f"data from byte {at}",
                found=f"data from byte {tensor.offset}",
            )
        at += tensor.nbytes
    if at != size:
        raise CheckpointError(
            f"{path} has bytes that belong to no tensor", expected=f"{at} bytes", found=f"{size} bytes"
        )


def _truncated(path: Path, expected: str, found: str) -> NoReturn:
    raise CheckpointError(
        f"{path} is truncated or is not a safetensors file",
        expected=expected,
        found=found,
        next="download or copy the file again",
    )
