"""Calibrate the text decoder with GPTQ on real activations, a layer at a time.

PyTorch's layers run on the calibration cases. Each layer is calibrated on the outputs of the quantized layers before
it; the vision encoder and matrices that are not calibrated stay in full precision. Guarantees: a single decoder layer
is in memory at a time, with the Hessians of its inputs; no held-out case is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from builder.checkpoint.load import Checkpoint
from builder.checkpoint.tensors import EMBEDDINGS, LM_HEAD
from builder.quantization.blockwise import Blocks, Quantized, dequantize
from builder.quantization.gptq import compensation, quantize_compensated
from builder.quantization.rules import WeightFormat
from builder.reference.cases import MAX_PATCHES, Case, read_calibration, suite_cases
from builder.reference.model import Prompt, Reference

LAYERS = "model.language_model.layers"
HEAD_ROWS = 8192  # rows of the head at a time

Store = Callable[[str, Quantized], None]


class _Caught(Exception):  # noqa: N818 – not an error: it ends a forward pass before the first layer
    pass


@dataclass
class Stream:
    """A case between two layers: the residual stream, a layer's keyword arguments, and where DeepStack is added."""

    hidden: Any
    call: Mapping[str, Any]
    levels: Sequence[Any]
    places: Any


def calibrated(
    checkpoint: Checkpoint,
    weight_formats: Mapping[str, WeightFormat],
    out: Path,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Path]:
    """Calibrate every matrix whose search is "gptq", and write a file for each to `out`.

    Args:
        checkpoint: checkpoint with the matrices.
        weight_formats: tensor → its format.
        out: folder of the files.
        advance: called after each layer, and after the head.

    Returns:
        Tensor → file.
    """
    wanted = {name: each.blocks for name, each in weight_formats.items() if each.blocks.search == "gptq"}
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, Path] = {}

    def store(name: str, quantized: Quantized) -> None:
        files[name] = out / f"{name}.npz"
        with files[name].open("wb") as file:
            np.savez(file, codes=quantized.codes, scales=quantized.scales, zeros=quantized.zeros)

    reference = Reference(checkpoint, streamed=True)
    with reference.torch.no_grad():
        streams = begin(reference, calibration_prompts(reference, checkpoint))
        for index in range(checkpoint.text.layers):
            _layer(reference, checkpoint, index, streams, wanted, store)
            advance()
        head = EMBEDDINGS if checkpoint.text.tied else LM_HEAD
        if head in wanted:
            _head(reference, checkpoint, head, streams, wanted[head], store)
        advance()
    return files


def load(path: Path) -> Quantized:
    """Read a file that `calibrated` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return Quantized(arrays["codes"], arrays["scales"], arrays["zeros"])


def begin(reference: Reference, prompts: Iterable[tuple[Prompt, Sequence[int]]]) -> list[Stream]:
    """The streams of prompts with their answers at the entry of the first layer."""
    model = reference.model.model.language_model
    caught: list[Stream] = []
    arguments: dict[str, Any] = {}

    def note(_module: Any, _args: Any, kwargs: Any) -> None:
        arguments.update(kwargs)

    def catch(_module: Any, args: Any, kwargs: Any) -> None:
        embeds, places = arguments.get("deepstack_visual_embeds"), arguments.get("visual_pos_masks")
        caught.append(Stream(args[0], dict(kwargs), embeds or (), places))
        raise _Caught

    hooks = [
        model.register_forward_pre_hook(note, with_kwargs=True),
        model.layers[0].register_forward_pre_hook(catch, with_kwargs=True, prepend=True),
    ]
    try:
        for prompt, answer in prompts:
            try:
                reference.hidden_states(prompt, answer, keep=1)
            except _Caught:
                continue
    finally:
        for hook in hooks:
            hook.remove()
    return caught


def calibration_prompts(reference: Reference, checkpoint: Checkpoint) -> Iterator[tuple[Prompt, tuple[int, ...]]]:
    """Prompts and answers of the suite's cases and of the checkpoint's own calibration cases, up to `MAX_PATCHES`."""
    with TemporaryDirectory() as images:
        cases: list[Case] = [*suite_cases(checkpoint, Path(images)), *read_calibration(checkpoint)]
        for case in cases:
            prompt = reference.prepare(case.prompt, case.images, lifted=case.lifted)
            if prompt.pixel_values is None or len(prompt.pixel_values) <= MAX_PATCHES:
                yield prompt, tuple(reference.tokenizer(case.answer or "")["input_ids"])


def _layer(
    reference: Reference,
    checkpoint: Checkpoint,
    index: int,
    streams: list[Stream],
    wanted: Mapping[str, Blocks],
    store: Store,
) -> None:
    """Calibrate a layer, then run every stream through it."""
    layer = loaded_layer(reference, checkpoint, index)
    names = {f"{LAYERS}.{index}.{name}.weight": module for name, module in _linears(reference, layer)}
    groups = {name: module for name, module in names.items() if name in wanted}

    def run() -> None:
        for stream in streams:
            through(layer, stream, index, add=False)

    hessians = _hessians(reference, groups, run)
    for key in list(hessians):
        members, hessian = hessians.pop(key)
        factors = compensation(hessian)
        for name in members:
            weight = groups[name].weight
            quantized = quantize_compensated(weight.numpy(), wanted[name], factors)
            weight.copy_(reference.torch.from_numpy(dequantize(quantized)))
            store(name, quantized)
    for stream in streams:
        stream.hidden = through(layer, stream, index, add=True)


def _hessians(
    reference: Reference, modules: Mapping[str, Any], run: Callable[[], None]
) -> dict[int, tuple[list[str], np.ndarray]]:
    """The Hessian E[x xᵀ] of each input, and the matrices that are multiplied with that input."""
    torch = reference.torch
    inputs: list[Any] = []  # kept alive, so that identity is not reused
    sources: dict[str, int] = {}
    sums: dict[int, Any] = {}
    counts: Counter[int] = Counter()

    def note(name: str) -> Callable[..., None]:
        def hook(_module: Any, args: Any) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            if name not in sources:
                same = [number for number, other in enumerate(inputs) if other is args[0]]
                sources[name] = same[0] if same else len(inputs)
                inputs.extend([] if same else [args[0]])
            key = sources[name]
            if next(other for other, source in sources.items() if source == key) == name:
                sums[key] = torch.addmm(sums[key], x.T, x) if key in sums else x.T @ x
                counts[key] += len(x)

        return hook

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in modules.items()]
    try:
        run()
    finally:
        for handle in hooks:
            handle.remove()
    members: dict[int, list[str]] = {}
    for name, key in sources.items():
        members.setdefault(key, []).append(name)
    return {key: (names, (sums.pop(key) / counts[key]).numpy()) for key, names in members.items()}


def through(layer: Any, stream: Stream, index: int, *, add: bool) -> Any:
    """The residual stream after the layer; with `add`, plus the DeepStack level that follows it."""
    out = layer(stream.hidden, **stream.call)
    out = out[0] if isinstance(out, tuple) else out
    if add and index < len(stream.levels):
        out = out.clone()
        out[stream.places] += stream.levels[index]
    return out


def _head(
    reference: Reference, checkpoint: Checkpoint, name: str, streams: list[Stream], blocks: Blocks, store: Store
) -> None:
    """Calibrate the head on the ends of all streams, `HEAD_ROWS` at a time."""
    from builder.reference.streaming import read_rows

    norm = reference.model.model.language_model.norm
    inputs = [norm(stream.hidden)[0] for stream in streams]
    hessian = sum(x.T @ x for x in inputs) / sum(map(len, inputs))
    factors = compensation(np.asarray(hessian, np.float32))
    tensor = checkpoint.tensors[name]
    pieces = []
    for start in range(0, tensor.shape[0], HEAD_ROWS):
        rows = read_rows(checkpoint.folder, tensor, start, min(start + HEAD_ROWS, tensor.shape[0]))
        pieces.append(quantize_compensated(rows.numpy(), blocks, factors))
    store(name, Quantized(*(np.concatenate([getattr(p, n) for p in pieces]) for n in ("codes", "scales", "zeros"))))


def loaded_layer(reference: Reference, checkpoint: Checkpoint, index: int) -> Any:
    """A copy of the layer with its weights in memory, separate from the model that streams them."""
    from copy import deepcopy

    from builder.reference.streaming import read_rows

    original = reference.model.model.language_model.layers[index]
    hooks = original._forward_pre_hooks, original._forward_hooks
    original._forward_pre_hooks, original._forward_hooks = type(hooks[0])(), type(hooks[1])()
    try:
        layer = deepcopy(original).to_empty(device="cpu")
    finally:
        original._forward_pre_hooks, original._forward_hooks = hooks
    for name, parameter in layer.named_parameters():
        tensor = checkpoint.tensors[f"{LAYERS}.{index}.{name}"]
        parameter.copy_(read_rows(checkpoint.folder, tensor, 0, tensor.shape[0]))
    return layer


def _linears(reference: Reference, layer: Any) -> Iterator[tuple[str, Any]]:
    for name, module in layer.named_modules():
        if isinstance(module, reference.torch.nn.Linear):
            yield name, module
