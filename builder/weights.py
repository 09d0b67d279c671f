"""Stream checkpoint tensors into a graph's external data file.

In: bindings and the checkpoint. Out: one data file, each initializer at an aligned offset, in the bindings' name order.
Guaranteed: no more than a block of one tensor is in memory; the file is written under a temporary name and renamed
when whole; its SHA-256 is taken from the bytes as they pass; the same inputs give the same bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from builder.checkpoint import Checkpoint
from builder.graph import Binding

ALIGNMENT = 4096  # pages: the runtime maps the file instead of copying it
BLOCK = 16 << 20  # bytes written at a time


@dataclass(frozen=True)
class Placement:
    """Where an initializer lies in the data file, in bytes."""

    initializer: str
    offset: int
    length: int


@dataclass(frozen=True)
class DataFile:
    """A written data file: where everything lies, its size in bytes and its SHA-256."""

    placements: tuple[Placement, ...]
    size: int
    sha256: str


def layout(bindings: Iterable[Binding]) -> tuple[Placement, ...]:
    """Offsets of the bindings, by initializer name, each on a page of its own."""
    placements, offset = [], 0
    for binding in sorted(bindings, key=lambda binding: binding.initializer):
        length = int(np.prod(binding.shape, dtype=np.int64)) * np.dtype(binding.dtype).itemsize
        placements.append(Placement(binding.initializer, offset, length))
        offset += -(-length // ALIGNMENT) * ALIGNMENT
    return tuple(placements)


def write_data(bindings: Sequence[Binding], checkpoint: Checkpoint, path: Path, block: int = BLOCK) -> DataFile:
    """Writes `path` block by block."""
    table = {binding.initializer: binding for binding in bindings}
    placements = layout(bindings)
    digest, written = hashlib.sha256(), 0
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        for placement in placements:
            padding = bytes(placement.offset - written)
            for piece in chain([padding], _pieces(table[placement.initializer], checkpoint, block)):
                digest.update(piece)
                written += file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    return DataFile(placements, written, digest.hexdigest())


def _pieces(binding: Binding, checkpoint: Checkpoint, block: int) -> Iterator[bytes]:
    """The initializer's bytes, row-major, at most about `block` bytes at a time."""
    tensor: npt.NDArray[Any] = checkpoint.read(binding.tensor).reshape(binding.shape)
    array = tensor.T if binding.transpose else tensor
    array = array.reshape(1) if array.ndim == 0 else array
    row = max(1, array[:1].size * np.dtype(binding.dtype).itemsize)
    rows = max(1, block // row)
    for start in range(0, array.shape[0], rows):
        piece = array[start : start + rows].astype(binding.dtype)
        yield piece.tobytes()
