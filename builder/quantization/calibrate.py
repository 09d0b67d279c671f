"""Quantize the text decoder on what really flows through it, a layer at a time.

In: the checkpoint, the formats of its matrices, cases to run. Out: a file a matrix with its codes, scales and zero
points, for `builder.graph.quantized_data`. Guaranteed: one decoder layer is in memory at a time, with the Hessian of
one input after the other; each layer is calibrated on what the layers before it, quantized, hand on; nothing of a
held-out set is used. PyTorch's own layers run; the vision encoder and matrices that are not to be calibrated stay
exact.
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
from builder.quantization.gptq import Compensation, compensation, quantize_compensated
from builder.quantization.rules import WeightFormat
from builder.reference.cases import MAX_PATCHES, Case, read_calibration, suite_cases
from builder.reference.model import Prompt, Reference

LAYERS = "model.language_model.layers"
HEAD_ROWS = 8192  # of the head at a time

Store = Callable[[str, Quantized], None]


class _Caught(Exception):  # noqa: N818 – no error: what ends a forward pass where its first layer would begin
    pass


@dataclass
class Stream:
    """One case between two layers: the residual stream, how a layer is called, and where DeepStack is added."""

    hidden: Any
    call: Mapping[str, Any]
    levels: Sequence[Any]
    places: Any


def calibrated(
    checkpoint: Checkpoint, storages: Mapping[str, WeightFormat], out: Path, advance: Callable[[], None] = lambda: None
) -> dict[str, Path]:
    """Writes each matrix that is to be calibrated into `out`; returns where each lies.

    Args:
        storages: tensor → how it is stored; those whose search is "gptq" are calibrated.
        advance: called after each layer, and after the head.
    """
    wanted = {name: one.blocks for name, one in storages.items() if one.blocks.search == "gptq"}
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
    """What `calibrated` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return Quantized(arrays["codes"], arrays["scales"], arrays["zeros"])


def begin(reference: Reference, prompts: Iterable[tuple[Prompt, Sequence[int]]]) -> list[Stream]:
    """Each prompt and its answer as they enter the first layer."""
    model = reference.model.model.language_model
    caught: list[Stream] = []
    given: dict[str, Any] = {}

    def note(_module: Any, _args: Any, kwargs: Any) -> None:
        given.update(kwargs)

    def catch(_module: Any, args: Any, kwargs: Any) -> None:
        embeds, places = given.get("deepstack_visual_embeds"), given.get("visual_pos_masks")
        caught.append(Stream(args[0], {k: v for k, v in kwargs.items()}, embeds or (), places))
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
    """The suite's cases of moderate size, and those beside the checkpoint with their answers."""
    with TemporaryDirectory() as drawn:
        cases: list[Case] = [*suite_cases(checkpoint, Path(drawn)), *read_calibration(checkpoint)]
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
    """Calibrates one layer, and takes every stream through it."""
    layer = loaded_layer(reference, checkpoint, index)
    names = {f"{LAYERS}.{index}.{name}.weight": module for name, module in _linears(reference, layer)}
    groups = {name: module for name, module in names.items() if name in wanted}

    def run() -> None:
        for one in streams:
            through(layer, one, index, add=False)

    hessians = _hessians(reference, groups, run)
    for key in list(hessians):
        members, hessian = hessians.pop(key)
        given = compensation(hessian)
        for name in members:
            weight = groups[name].weight
            quantized = quantize_compensated(weight.numpy(), wanted[name], given)
            weight.copy_(reference.torch.from_numpy(dequantize(quantized)))
            store(name, quantized)
    for one in streams:
        one.hidden = through(layer, one, index, add=True)


def _hessians(
    reference: Reference, modules: Mapping[str, Any], run: Callable[[], None]
) -> dict[int, tuple[list[str], np.ndarray]]:
    """The Hessian E[x xᵀ] of each input, and the matrices that it is multiplied with: those of one input share it."""
    torch = reference.torch
    inputs: list[Any] = []  # held, so that no other input gets the place of one in memory
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
        for one in hooks:
            one.remove()
    members: dict[int, list[str]] = {}
    for name, key in sources.items():
        members.setdefault(key, []).append(name)
    return {key: (names, (sums.pop(key) / counts[key]).numpy()) for key, names in members.items()}


def through(layer: Any, one: Stream, index: int, *, add: bool) -> Any:
    """The stream behind the layer; with `add`, and the DeepStack level that follows it."""
    out = layer(one.hidden, **one.call)
    out = out[0] if isinstance(out, tuple) else out
    if add and index < len(one.levels):
        out = out.clone()
        out[one.places] += one.levels[index]
    return out


def _head(
    reference: Reference, checkpoint: Checkpoint, name: str, streams: list[Stream], blocks: Blocks, store: Store
) -> None:
    """Calibrates the head on every stream's end, some of its rows at a time."""
    from builder.reference.streaming import read_rows

    norm = reference.model.model.language_model.norm
    inputs = [norm(one.hidden)[0] for one in streams]
    total = sum(x.T @ x for x in inputs) / sum(map(len, inputs))
    given: Compensation = compensation(np.asarray(total, np.float32))
    tensor = checkpoint.tensors[name]
    pieces = []
    for start in range(0, tensor.shape[0], HEAD_ROWS):
        rows = read_rows(checkpoint.folder, tensor, start, min(start + HEAD_ROWS, tensor.shape[0]))
        pieces.append(quantize_compensated(rows.numpy(), blocks, given))
    store(name, Quantized(*(np.concatenate([getattr(p, n) for p in pieces]) for n in ("codes", "scales", "zeros"))))


def loaded_layer(reference: Reference, checkpoint: Checkpoint, index: int) -> Any:
    """The layer with its weights in memory, apart from the model that streams them."""
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
