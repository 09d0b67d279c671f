"""Read a safetensors file and hash it in one pass.

Uses plain reads instead of a memory map, whose pages count as memory of this process and which crashes it if the file
shrinks. A file that ends early, changes or is replaced while it is read is an error.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from builder.checkpoint.safetensors import NUMPY_TYPES, Tensor
from builder.util.errors import CheckpointError

BLOCK = 4 << 20  # bytes of a tensor that are read, or that they are converted to, at a time
STEP = 16 << 20  # bytes read at a time only to hash them
AHEAD = 64 << 20  # bytes that the system is advised to read ahead

Bytes = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]


class Shard:
    """An open file that hashes bytes in order as they are first read or skipped."""

    def __init__(self, path: Path, stream: BinaryIO, hashing: ThreadPoolExecutor) -> None:
        self.path, self._stream, self._hashing = path, stream, hashing
        self._digest, self._hashed = hashlib.sha256(), 0
        self._last = hashing.submit(lambda: None)

    def read(self, start: int, stop: int) -> Bytes:
        """Read the bytes from `start` up to `stop`, uint8 [stop - start].

        Raises:
            CheckpointError: the file ends before `stop`, or cannot be read.
        """
        self._hash_up_to(start)
        content = np.empty(stop - start, np.uint8)
        rest = content.data
        try:
            self._stream.seek(start)
            while rest.nbytes and (count := self._stream.readinto(rest)):  # type: ignore[attr-defined]
                rest = rest[count:]
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if rest.nbytes:
            raise CheckpointError(
                f"{self.path} was cut short while it was read",
                expected=f"at least {stop} bytes",
                found=f"{stop - rest.nbytes} bytes",
            )
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._stream.fileno(), stop, AHEAD, os.POSIX_FADV_WILLNEED)
        if start == self._hashed:
            self._last.result()  # wait, so that at most two pieces are in memory
            self._last = self._hashing.submit(self._digest.update, content.data)
            self._hashed = stop
        return content

    def sha256(self) -> str:
        """Return the SHA-256 of the file (hex), after reading the rest of it."""
        self._hash_up_to(os.fstat(self._stream.fileno()).st_size)
        self._last.result()
        return self._digest.hexdigest()

    def _hash_up_to(self, stop: int) -> None:
        """Hash the bytes before `stop` that were not read: the header, and tensors that were skipped."""
        while self._hashed < stop:
            self.read(self._hashed, min(stop, self._hashed + STEP))


@contextmanager
def open_shard(path: Path) -> Iterator[Shard]:
    """Open the file at `path`, which must not change inside the `with` block.

    Raises:
        CheckpointError: the file cannot be opened, or has changed at the end of the block.
    """
    try:
        stream = path.open("rb", buffering=0)
    except OSError as error:
        raise _unreadable(path, error) from error
    with stream, ThreadPoolExecutor(1) as hashing:
        before = _state(os.fstat(stream.fileno()))
        yield Shard(path, stream, hashing)
        try:
            after = _state(path.stat())
        except OSError as error:
            raise CheckpointError(
                f"{path} was removed while it was read",
                expected="the same file from the first byte to the last",
                found=error.strerror,
            ) from error
    if after != before:
        raise CheckpointError(
            f"{path} changed while it was read",
            expected="the same file from the first byte to the last",
            found="another size, time or file",
            next="wait until no other program writes the file, then run the same command again",
        )


def blocks_of(tensor: Tensor, shard: Shard, rows: int, columns: int, itemsize: int = 0) -> Iterator[Array]:
    """Read a tensor as consecutive blocks [some rows, columns] of at most `BLOCK` bytes, before and after conversion.

    Args:
        itemsize: bytes of an element after conversion.
    """
    dtype = NUMPY_TYPES[tensor.dtype]
    width = columns * np.dtype(dtype).itemsize
    step = max(1, BLOCK // max(1, width, columns * itemsize))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        content = shard.read(tensor.offset + start * width, tensor.offset + stop * width)
        yield content.view(dtype).reshape(stop - start, columns)


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read", expected="a readable file", found=error.strerror or error)


def _state(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
