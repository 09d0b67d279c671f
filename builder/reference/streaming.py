"""Run upstream's model for checkpoints that do not fit in memory, reading weights on use and releasing them after.

All forwards but the embedding lookup and the head are upstream's. In memory are the weights of one layer, the requested
embedding rows, and one block of the head; no file is mapped.
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

READ_BYTES = 2**20  # of a stored tensor, read at a time: small enough to stay in the cache while it is cast
HEAD_BYTES = 64 * 2**20  # of the head in fp32, in memory at a time
# Blocks of the head are multiples of this: odd sizes use other kernels, whose sums differ by up to 6e-6 of the logits'
# standard deviation, whereas these equal the unblocked head bit for bit.
HEAD_ROWS = 64
STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
TOWERS = ("model.visual", "model.language_model")


class StreamedModel(Qwen3VLForConditionalGeneration):  # type: ignore[no-untyped-call]
    """Upstream's model with its parameters on the meta device."""

    @property
    def device(self) -> torch.device:
        """Device of the computation; upstream would return its first parameter's, and `generate()` allocate there."""
        return torch.device("cpu")


class EmbeddingRows(nn.Module):
    """Look up ids of any shape, int64, as [*ids, hidden] fp32, reading each requested row once per call."""

    def __init__(self, folder: Path, tensor: Tensor) -> None:
        super().__init__()
        self.folder, self.tensor = folder, tensor

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        requested, places = torch.unique(ids, return_inverse=True)
        rows = torch.empty(len(requested), self.tensor.shape[1])
        for place, row in enumerate(requested.tolist()):
            rows[place] = read_rows(self.folder, self.tensor, row, row + 1)[0]
        return rows[places]


class HeadInBlocks(nn.Module):
    """Map hidden [..., hidden] to logits [..., vocab] fp32, one block of vocabulary rows at a time."""

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
    """Return upstream's model with its default attention, usable like the result of `from_pretrained`.

    Its forward raises `CheckpointError` if a file is missing or truncated.

    Raises:
        WeightError: a parameter has no tensor, or a tensor no parameter.
    """
    config: Any = Qwen3VLConfig.from_pretrained(checkpoint.folder)
    kind: Any = StreamedModel
    with torch.device("meta"):
        model = kind._from_config(config, dtype=torch.float32)
    # An autograd graph would keep the weights of every layer.
    model.eval().requires_grad_(False)
    if checkpoint.generation:
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    recompute_frequencies(model)
    _require_same_names({name for name, _ in model.named_parameters()}, checkpoint.tensors)
    head = EMBEDDINGS if checkpoint.text.tied else LM_HEAD
    model.model.language_model.embed_tokens = EmbeddingRows(checkpoint.folder, checkpoint.tensors[EMBEDDINGS])
    model.lm_head = HeadInBlocks(checkpoint.folder, checkpoint.tensors[head])
    for name, part in _parts(model):
        _stream(name, part, checkpoint)
    return model


def _require_same_names(parameters: Collection[str], tensors: Collection[str]) -> None:
    for name in (*parameters, *tensors):
        if name not in tensors:
            raise WeightError(
                f"upstream's parameter {name} has no tensor in the checkpoint", expected=nearest(name, tensors)
            )
        if name not in parameters:
            raise WeightError(f"the tensor {name} is not a parameter upstream", expected=nearest(name, parameters))


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that are loaded as a unit, with names: each layer, block and merger, and those around them."""
    for tower in TOWERS:
        for name, child in model.get_submodule(tower).named_children():
            if isinstance(child, nn.ModuleList):
                yield from ((f"{tower}.{name}.{index}", module) for index, module in child.named_children())
            else:
                yield f"{tower}.{name}", child


def _stream(prefix: str, part: nn.Module, checkpoint: Checkpoint) -> None:
    """Load the weights of `part` before each of its forwards and release them after, even if it fails."""
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
    """Read rows [start, stop) of a tensor as fp32 [stop - start, *other axes].

    Raises:
        IndexError: the rows are out of range.
        CheckpointError: the file is missing, unreadable or too short.
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
    """Read the bytes of a tensor from `start` on, until `into` is full."""
    path = folder / tensor.file
    try:
        with path.open("rb") as stream:
            stream.seek(tensor.offset + start)
            count = stream.readinto(into.data)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read", found=error.strerror) from error
    if count < len(into):
        raise CheckpointError(
            f"{path} was truncated after it was opened",
            expected=f"{tensor.name} up to byte {tensor.offset + start + len(into)}",
            found=f"{tensor.offset + start + count} bytes",
        )
