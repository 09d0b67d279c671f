"""Quantize a checkpoint's matrix while it is read: a block of rows at a time, a few of them side by side.

In: the parts of one quantized matrix, and the open checkpoint. Out: the bytes of each part, in the order in which
they lie in the file. Guaranteed: codes are handed on as they come, but for a matrix that is transposed, which is held;
what is held beside them are the matrix's scales and zero points, which are a sixteenth of it or less.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from builder.checkpoint.load import Checkpoint
from builder.checkpoint.safetensors import NUMPY_TYPES, Tensor, map_bytes
from builder.checkpoint.shard_reader import BLOCK, Shard, blocks_of
from builder.graph.binding import Binding
from builder.quantization.blockwise import Blocks, Quantized, quantize
from builder.quantization.packing import Part, packed_parts

PARTS: tuple[Part, ...] = get_args(Part)
AHEAD = 4  # blocks of rows on their way

Array = npt.NDArray[Any]
CalibratedRows = Mapping[str, Callable[[], Quantized]]


@dataclass(frozen=True)
class QuantizationSource:
    """
    Args:
        shard: the file of it that is being read.
        workers: that quantize.
        given: tensor → what reads its codes, scales and zeros where they are known
        (builder/quantization/calibrate.py).
    """

    checkpoint: Checkpoint
    shard: Shard
    workers: ThreadPoolExecutor
    given: CalibratedRows = field(default_factory=dict)


def quantized_parts(contents: Sequence[Binding], source: QuantizationSource) -> Iterator[Iterable[Array]]:
    """The pieces of each content: codes, then scales, then zero points."""
    kept: dict[Part, list[Array]] = {one.part: [] for one in contents[1:] if one.part}
    scales = next(one.dtype for one in contents if one.part == "scales")

    def codes() -> Iterator[Array]:
        for quantized, blocks in _quantized(contents[0], source):
            packed = packed_parts(quantized, blocks, scales)
            for part, pieces in kept.items():
                pieces.append(packed[part])
            yield packed["levels"]

    yield [np.concatenate(list(codes())).T.copy()] if contents[0].transposed else codes()
    yield from kept.values()


def _quantized(content: Binding, source: QuantizationSource) -> Iterator[tuple[Quantized, Blocks]]:
    blocks, columns = content.blocks, content.shape[1]
    assert blocks is not None
    waiting: deque[Future[Quantized]] = deque()
    for name in content.tensors:
        if name in source.given:
            while waiting:  # the rows of members before it
                yield waiting.popleft().result(), blocks
            yield source.given[name](), blocks
            continue
        for block in _rows(source, source.checkpoint.tensors[name], columns):
            waiting.append(source.workers.submit(_one, block, blocks))
            if len(waiting) >= AHEAD:
                yield waiting.popleft().result(), blocks
    while waiting:
        yield waiting.popleft().result(), blocks


def _rows(source: QuantizationSource, tensor: Tensor, columns: int) -> Iterator[Array]:
    """[some rows, columns]; of a matrix in another file than its neighbours', mapped: that file has its own turn."""
    count, width = tensor.shape[0], np.dtype(np.float32).itemsize
    if source.shard.path == source.checkpoint.folder / tensor.file:
        yield from blocks_of(tensor, source.shard, count, columns, width)
        return
    mapped: Array = map_bytes(source.checkpoint.folder, tensor).view(NUMPY_TYPES[tensor.dtype]).reshape(count, columns)
    step = max(1, BLOCK // (columns * width))
    for start in range(0, count, step):
        yield np.asarray(mapped[start : start + step])


def _one(block: Array, blocks: Blocks) -> Quantized:
    return quantize(block.astype(np.float32), blocks)
