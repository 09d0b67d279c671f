"""Quantize a checkpoint's matrices while they are read, a few blocks of rows in parallel.

Codes are streamed, except those of a transposed matrix; scales and zero points, at most a sixteenth of the matrix, are
kept in memory until its codes are written.
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
AHEAD = 4  # blocks of rows in flight

Array = npt.NDArray[Any]
CalibratedRows = Mapping[str, Callable[[], Quantized]]


@dataclass(frozen=True)
class QuantizationSource:
    """Where the rows of quantized matrices come from.

    Args:
        shard: the checkpoint file that is being read.
        workers: threads that quantize.
        calibrated: tensor → function that reads its codes, scales and zeros, for matrices that were calibrated
            (builder/quantization/calibrate.py).
    """

    checkpoint: Checkpoint
    shard: Shard
    workers: ThreadPoolExecutor
    calibrated: CalibratedRows = field(default_factory=dict)


def quantized_parts(contents: Sequence[Binding], source: QuantizationSource) -> Iterator[Iterable[Array]]:
    """The pieces of each content: codes, then scales, then zero points."""
    kept: dict[Part, list[Array]] = {content.part: [] for content in contents[1:] if content.part}
    scales = next(content.dtype for content in contents if content.part == "scales")

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
        if name in source.calibrated:
            while waiting:  # the rows of the tensors before it
                yield waiting.popleft().result(), blocks
            yield source.calibrated[name](), blocks
            continue
        for block in _rows(source, source.checkpoint.tensors[name], columns):
            waiting.append(source.workers.submit(_quantize_block, block, blocks))
            if len(waiting) >= AHEAD:
                yield waiting.popleft().result(), blocks
    while waiting:
        yield waiting.popleft().result(), blocks


def _rows(source: QuantizationSource, tensor: Tensor, columns: int) -> Iterator[Array]:
    """[some rows, columns]; a tensor outside the open shard is mapped, as its own file is streamed later or before."""
    count, width = tensor.shape[0], np.dtype(np.float32).itemsize
    if source.shard.path == source.checkpoint.folder / tensor.file:
        yield from blocks_of(tensor, source.shard, count, columns, width)
        return
    mapped: Array = map_bytes(source.checkpoint.folder, tensor).view(NUMPY_TYPES[tensor.dtype]).reshape(count, columns)
    step = max(1, BLOCK // (columns * width))
    for start in range(0, count, step):
        yield np.asarray(mapped[start : start + step])


def _quantize_block(block: Array, blocks: Blocks) -> Quantized:
    return quantize(block.astype(np.float32), blocks)
