"""Upstream's model for a checkpoint that does not fit in memory: a weight is read when it is used, then let go.

In: a checkpoint, whose weights stay on disk. Out: upstream's own Qwen3-VL, in fp32 on the CPU.
Guaranteed: every forward that runs is upstream's, but for the embedding lookup and the head; in memory are the weights
of one layer at a time, the embedding rows asked for, one block of the head; no file is mapped; every tensor of the
checkpoint has its place in the model, and every parameter its tensor.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from builder.checkpoint.load import Checkpoint
from builder.checkpoint.safetensors import Tensor
from builder.checkpoint.tensors import EMBEDDINGS, LM_HEAD, nearest
from builder.reference.meta_model import recompute_frequencies
from builder.util.errors import CheckpointError, WeightError

READ_BYTES = 2**20  # of a tensor as it is stored, at a time: it stays in the processor's cache while it is cast
HEAD_BYTES = 64 * 2**20  # of the head in fp32, at a time
# Blocks of the head are multiples of it: odd ones go to other kernels, whose sums differ by up to 6e-6 of the logits'
# standard deviation; with these, what comes out is what the whole head gives, bit for bit.
HEAD_ROWS = 64
STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
TOWERS = ("model.visual", "model.language_model")


class StreamedModel(Qwen3VLForConditionalGeneration):  # type: ignore[no-untyped-call]
    """Upstream's model while its parameters lie on the meta device."""

    @property
    def device(self) -> torch.device:
        """Where it computes. Upstream asks its first parameter, and `generate()` would make its own tensors there."""
        return torch.device("cpu")


class EmbeddingRows(nn.Module):
    """ids, any shape, int64 → [*ids, hidden] fp32; each row that is asked for is read, once a call."""

    def __init__(self, folder: Path, tensor: Tensor) -> None:
        super().__init__()
        self.folder, self.tensor = folder, tensor

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        wanted, places = torch.unique(ids, return_inverse=True)
        rows = torch.empty(len(wanted), self.tensor.shape[1])
        for place, row in enumerate(wanted.tolist()):
            rows[place] = read_rows(self.folder, self.tensor, row, row + 1)[0]
        return rows[places]


class HeadInBlocks(nn.Module):
    """hidden [..., hidden] → logits [..., vocab] fp32, one block of vocabulary rows after the other."""

    def __init__(self, folder: Path, tensor: Tensor) -> None:
        super().__init__()
        self.folder, self.tensor = folder, tensor

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        vocab, width = self.tensor.shape
        step = max(HEAD_BYTES // (4 * width * HEAD_ROWS), 1) * HEAD_ROWS
        logits = hidden.new_empty(*hidden.shape[:-1], vocab)
        for start in range(0, vocab, step):
            rows = read_rows(self.folder, self.tensor, start, min(start + step, vocab))
            logits[..., start : start + step] = nn.functional.linear(hidden, rows)
        return logits


def streamed_model(checkpoint: Checkpoint) -> Any:
    """Upstream's model with its default attention, to be used like one of `from_pretrained`.

    Its forward raises `CheckpointError` where a file is gone or has become shorter.

    Raises:
        WeightError: a parameter of upstream's has no tensor, or a tensor no parameter.
    """
    config: Any = Qwen3VLConfig.from_pretrained(checkpoint.folder)
    kind: Any = StreamedModel
    with torch.device("meta"):
        model = kind._from_config(config, dtype=torch.float32)
    # A graph of gradients would hold the weights of every layer.
    model.eval().requires_grad_(False)
    if checkpoint.generation:
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    recompute_frequencies(model)
    _demand_the_same({name for name, _ in model.named_parameters()}, checkpoint.tensors)
    head = EMBEDDINGS if checkpoint.text.tied else LM_HEAD
    model.model.language_model.embed_tokens = EmbeddingRows(checkpoint.folder, checkpoint.tensors[EMBEDDINGS])
    model.lm_head = HeadInBlocks(checkpoint.folder, checkpoint.tensors[head])
    for name, part in _parts(model):
        _stream(name, part, checkpoint)
    return model


def _demand_the_same(parameters: Collection[str], tensors: Collection[str]) -> None:
    for name in (*parameters, *tensors):
        if name not in tensors:
            raise WeightError(f"upstream's parameter {name} has no tensor", expected=nearest(name, tensors))
        if name not in parameters:
            raise WeightError(f"the tensor {name} has no parameter upstream", expected=nearest(name, parameters))


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What is in memory as one, by name: each layer, block and merger, and what lies before and behind them."""
    for tower in TOWERS:
        for name, child in model.get_submodule(tower).named_children():
            if isinstance(child, nn.ModuleList):
                yield from ((f"{tower}.{name}.{index}", module) for index, module in child.named_children())
            else:
                yield f"{tower}.{name}", child


def _stream(prefix: str, part: nn.Module, checkpoint: Checkpoint) -> None:
    """Gives `part` its weights for as long as each of its forwards takes, one that fails included."""
    empty = dict(part.named_parameters())

    def load(*_: object) -> None:
        for name in empty:
            tensor = checkpoint.tensors[f"{prefix}.{name}"]
            values = read_rows(checkpoint.folder, tensor, 0, tensor.shape[0])
            _put(part, name, nn.Parameter(values, requires_grad=False))

    def release(*_: object) -> None:
        for name, parameter in empty.items():
            _put(part, name, parameter)

    part.register_forward_pre_hook(load)
    part.register_forward_hook(release, always_call=True)


def _put(part: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(part.get_submodule(owner), attribute, parameter)


def read_rows(folder: Path, tensor: Tensor, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a tensor, fp32 [stop - start, *the other axes].

    Raises:
        IndexError: there are no such rows.
        CheckpointError: the file is gone, cannot be read, or ends before them.
    """
    rows, *rest = tensor.shape
    if not 0 <= start <= stop <= rows:
        raise IndexError(f"{tensor.name} has {rows} rows, not {start} to {stop}")
    width, stored = math.prod(rest), STORED[tensor.dtype]
    values = torch.empty((stop - start) * width)
    step = max(READ_BYTES // stored.itemsize, 1)
    raw = torch.empty(min(step, len(values)) * stored.itemsize, dtype=torch.uint8)
    for begin in range(0, len(values), step):
        part = values[begin : begin + step]
        piece = raw[: len(part) * stored.itemsize]
        _read(folder, tensor, (start * width + begin) * stored.itemsize, piece.numpy())
        part.copy_(piece.view(stored))
    return values.view(stop - start, *rest)


def _read(folder: Path, tensor: Tensor, start: int, into: npt.NDArray[np.uint8]) -> None:
    """The bytes of a tensor from `start` on, as many as `into` takes."""
    path = folder / tensor.file
    try:
        with path.open("rb") as stream:
            stream.seek(tensor.offset + start)
            count = stream.readinto(into.data)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read", found=error.strerror) from error
    if count < len(into):
        raise CheckpointError(
            f"{path} has become shorter since it was opened",
            expected=f"{tensor.name} up to byte {tensor.offset + start + len(into)}",
            found=f"{tensor.offset + start + count} bytes",
        )
