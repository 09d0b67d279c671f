"""Read a safetensors file front to back, and know at the end what was read.

In: a file of a checkpoint. Out: its bytes as asked for, and their SHA-256.
Guaranteed: plain reads, no memory map (whose pages count as this process' memory, and which crashes it where a file
gets shorter); a file that ends early, changes or is replaced while it is read is an error.
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

BLOCK = 4 << 20  # bytes of a tensor that are read, and of what becomes of them, at a time
STEP = 16 << 20  # bytes read at a time where nobody asks for them
AHEAD = 64 << 20  # bytes that the disk is asked for while those before them are in use

Bytes = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]


class Shard:
    """One open file; what is read for the first time goes into its digest, and so does what is passed over."""

    def __init__(self, path: Path, stream: BinaryIO, hashing: ThreadPoolExecutor) -> None:
        self.path, self._stream, self._hashing = path, stream, hashing
        self._digest, self._hashed = hashlib.sha256(), 0
        self._last = hashing.submit(lambda: None)

    def read(self, start: int, stop: int) -> Bytes:
        """The bytes from `start` up to `stop`, uint8 [stop - start].

        Raises:
            CheckpointError: the file ends before `stop`, or cannot be read.
        """
        self._pass_over(start)
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
            self._last.result()  # so that no more than two pieces are held
            self._last = self._hashing.submit(self._digest.update, content.data)
            self._hashed = stop
        return content

    def sha256(self) -> str:
        """Of the whole file (hex); what nobody has asked for is read now."""
        self._pass_over(os.fstat(self._stream.fileno()).st_size)
        self._last.result()
        return self._digest.hexdigest()

    def _pass_over(self, stop: int) -> None:
        """Reads up to `stop`: the header, and tensors that nobody has asked for."""
        while self._hashed < stop:
            self.read(self._hashed, min(stop, self._hashed + STEP))


@contextmanager
def open_shard(path: Path) -> Iterator[Shard]:
    """The file at `path`, which must stay as it is inside.

    Raises:
        CheckpointError: it cannot be opened, or is another one at the end than it was at the beginning.
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
                f"{path} is gone since it was opened",
                expected="the same file from the first byte to the last",
                found=error.strerror,
            ) from error
    if after != before:
        raise CheckpointError(
            f"{path} changed while it was read",
            expected="the same file from the first byte to the last",
            found="another size, time or file",
            next="let whatever writes it finish, then run the same command again",
        )


def blocks_of(tensor: Tensor, shard: Shard, rows: int, columns: int, itemsize: int = 0) -> Iterator[Array]:
    """[some rows, columns], one after the other; at most `BLOCK` bytes of them, and of what they become.

    Args:
        itemsize: bytes of an element of what they become.
    """
    dtype = NUMPY_TYPES[tensor.dtype]
    width = columns * np.dtype(dtype).itemsize
    step = max(1, BLOCK // max(1, width, columns * itemsize))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        content = shard.read(tensor.offset + start * width, tensor.offset + stop * width)
        yield content.view(dtype).reshape(stop - start, columns)


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read", expected="a file that can be", found=error.strerror or error)


def _state(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
