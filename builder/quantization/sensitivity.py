"""Estimate how much accuracy each group of 4-bit matrices costs.

The cost of a group is the KL divergence of the next token from PyTorch in fp32, in nats, when only that group is
rounded. A group is what becomes a single matmul (q, k and v; gate and up), the embeddings with a tied head, or a block
of the vision encoder. Guarantees: a single layer is in memory at a time; no held-out case is used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from builder.checkpoint.load import Checkpoint
from builder.checkpoint.tensors import EMBEDDINGS, LM_HEAD
from builder.quantization.blockwise import Blocks, dequantize, quantize
from builder.quantization.calibrate import Stream, begin, calibration_prompts, loaded_layer, through
from builder.quantization.rules import Rule, WeightFormat, resolve, shares_the_head
from builder.reference.model import Prompt, Reference
from builder.util.errors import RecipeError
from builder.util.statistics import kl_divergence, log_softmax

Array = npt.NDArray[Any]
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
LAYER = re.compile(r"model\.language_model\.layers\.(\d+)\.")
BLOCK = re.compile(r"(model\.visual\.blocks\.\d+)\.")
LOW, HIGH = 4, 8  # bits


@dataclass(frozen=True)
class Group:
    """Matrices that get the same number of bits.

    Args:
        tensors: their names.
        extra_bytes: bytes that 8 bits take beyond 4.
    """

    tensors: tuple[str, ...]
    extra_bytes: int

    @property
    def name(self) -> str:
        """The names of its tensors, with the common prefix once."""
        first = self.tensors[0].removesuffix(".weight")
        if block := BLOCK.match(first):
            return block[1]
        path, _, _ = first.rpartition(".")
        return f"{path}.{'+'.join(name.removesuffix('.weight').rpartition('.')[2] for name in self.tensors)}"


@dataclass(frozen=True)
class Sensitivity:
    """The mean KL divergence over all positions, in nats, when only this group is rounded."""

    group: Group
    kl: float

    @property
    def per_byte(self) -> float:
        """The most that each byte of 8 bits can save."""
        return self.kl / self.group.extra_bytes


def groups(checkpoint: Checkpoint, weight_formats: Mapping[str, WeightFormat]) -> list[Group]:
    """All matrices stored in 4 bits, in groups."""
    members: dict[str, list[str]] = {}
    for name, weight_format in weight_formats.items():
        if weight_format.blocks.bits == LOW:
            members.setdefault(_key(name), []).append(name)
    return [
        Group(tuple(names), sum(math.prod(checkpoint.tensors[name].shape) for name in names) * (HIGH - LOW) // 8)
        for names in members.values()
    ]


def estimate_sensitivities(
    checkpoint: Checkpoint, rules: Sequence[Rule], positions: int, advance: Callable[[], None] = lambda: None
) -> list[Sensitivity]:
    """Estimate the sensitivity of every group, the largest KL divergence first.

    Args:
        checkpoint: checkpoint with the matrices.
        rules: rules of a recipe.
        positions: minimum number of tokens whose distributions are compared, if the calibration cases have that many.
        advance: called after each group.

    Raises:
        RecipeError: the rules store nothing in 4 bits.
    """
    weight_formats = resolve(rules, checkpoint.tensors)
    candidates = groups(checkpoint, weight_formats)
    if not candidates:
        raise RecipeError(
            "the recipe stores nothing in 4 bits",
            expected='rules with store = "int4"',
            found=f"{len(weight_formats)} matrices in 8 bits" if weight_formats else "no rules",
            next="--recipe int4",
        )
    estimator = _Estimator.of(checkpoint, weight_formats, positions)
    sensitivities = []
    with estimator.reference.torch.no_grad():
        exact = estimator.distributions(estimator.after(0, estimator.begun()))
        for group in sorted(candidates, key=estimator.layer_of):
            sensitivities.append(Sensitivity(group, estimator.divergence(exact, group)))
            advance()
    return sorted(sensitivities, key=lambda each: -each.kl)


def _key(name: str) -> str:
    if block := BLOCK.match(name):
        return block[1]
    path, _, module = name.removesuffix(".weight").rpartition(".")
    return next((f"{path}.{names}" for names in TOGETHER if module in names), name)


def _prompts(
    reference: Reference, checkpoint: Checkpoint, positions: int
) -> Iterator[tuple[Prompt, tuple[int, ...], int]]:
    """Prompts with their answers, and how many of the last positions are compared: all after the last image."""
    left = positions
    for prompt, answer in calibration_prompts(reference, checkpoint):
        ids = prompt.input_ids[0]
        images = np.flatnonzero(ids == reference.image_token_id)
        keep = len(ids) + len(answer) - (int(images[-1]) + 1 if len(images) else 0)
        yield prompt, answer, keep
        left -= keep
        if left <= 0:
            return


@dataclass
class _Estimator:
    """The prompts, and their streams in full precision at the entry of layer `reached`."""

    checkpoint: Checkpoint
    weight_formats: Mapping[str, WeightFormat]
    reference: Reference
    prompts: list[tuple[Prompt, tuple[int, ...], int]]
    reached: int = 0
    streams: list[Stream] = field(default_factory=list)

    @classmethod
    def of(cls, checkpoint: Checkpoint, weight_formats: Mapping[str, WeightFormat], positions: int) -> _Estimator:
        reference = Reference(checkpoint, streamed=True)
        return cls(checkpoint, weight_formats, reference, list(_prompts(reference, checkpoint, positions)))

    def layer_of(self, group: Group) -> int:
        """The group's decoder layer; -1 if it is outside of the layers."""
        match = LAYER.match(group.tensors[0])
        return int(match[1]) if match else -1

    def begun(self) -> list[Stream]:
        return begin(self.reference, ((prompt, answer) for prompt, answer, _ in self.prompts))

    def after(self, first: int, streams: Sequence[Stream], rounded: Sequence[str] = ()) -> list[Stream]:
        """Run streams from layer `first`, whose matrices in `rounded` are rounded, through the last layer."""
        for index in range(first, self.checkpoint.text.layers):
            layer = loaded_layer(self.reference, self.checkpoint, index)
            for name in rounded if index == first else ():
                weight = layer.get_submodule(name.removesuffix(".weight").partition(f"layers.{index}.")[2]).weight
                weight.copy_(self.rounded(weight, self.weight_formats[name].blocks))
            streams = [replace(stream, hidden=through(layer, stream, index, add=True)) for stream in streams]
        return list(streams)

    def distributions(self, streams: Sequence[Stream]) -> list[Array]:
        """Log-probabilities of each prompt, [keep, vocab], in fp32 as those of all prompts are in memory."""
        model = self.reference.model
        ends = [stream.hidden[:, -keep:] for stream, (_, _, keep) in zip(streams, self.prompts, strict=True)]
        logits = (model.lm_head(model.model.language_model.norm(end))[0].numpy() for end in ends)
        return [log_softmax(rows).astype(np.float32) for rows in logits]

    def divergence(self, exact: Sequence[Array], group: Group) -> float:
        """Mean KL divergence over all positions, in nats."""
        layer = self.layer_of(group)
        if layer < 0:
            with self.hooked(group):
                got = self.distributions(self.after(0, self.begun()))
        else:
            self.reach(layer)
            got = self.distributions(self.after(layer, self.streams, group.tensors))
        kl = [kl_divergence(p, q) for p, q in zip(exact, got, strict=True)]
        return float(np.concatenate(kl).mean())

    def reach(self, layer: int) -> None:
        """Run the streams in full precision up to the entry of a layer."""
        if not self.streams:
            self.streams = self.begun()
        while self.reached < layer:
            own = loaded_layer(self.reference, self.checkpoint, self.reached)
            self.streams = [replace(each, hidden=through(own, each, self.reached, add=True)) for each in self.streams]
            self.reached += 1

    def rounded(self, rows: Any, blocks: Blocks) -> Any:
        """Quantized and dequantized rows: scales are searched, errors are not compensated."""
        searched = Blocks(blocks.bits, blocks.size, blocks.zero_points, "mse")
        return self.reference.torch.from_numpy(dequantize(quantize(rows.numpy(), searched)))

    @contextmanager
    def hooked(self, group: Group) -> Iterator[None]:
        """Round the embeddings, the head or a block of the vision encoder."""
        model = self.reference.model
        with ExitStack() as hooks:
            for name in group.tensors:
                blocks = self.weight_formats[name].blocks
                if name == EMBEDDINGS:
                    hooks.enter_context(
                        model.model.language_model.embed_tokens.register_forward_hook(self.looked_up(blocks))
                    )
                if name == LM_HEAD or shares_the_head(self.checkpoint.tensors, name):
                    hooks.enter_context(model.lm_head.register_forward_hook(self.multiplied(blocks)))
                if name not in (EMBEDDINGS, LM_HEAD):
                    module = model.get_submodule(name.removesuffix(".weight"))
                    hooks.enter_context(module.register_forward_pre_hook(self.weighed(blocks)))
            yield

    def looked_up(self, blocks: Blocks) -> Callable[..., Any]:
        return lambda _module, _args, out: self.rounded(out.reshape(-1, out.shape[-1]), blocks).reshape(out.shape)

    def multiplied(self, blocks: Blocks) -> Callable[..., Any]:
        from builder.reference.streaming import HEAD_BYTES, read_rows

        torch = self.reference.torch

        def hook(head: Any, args: Any, out: Any) -> Any:
            step, logits = max(1, HEAD_BYTES // (4 * args[0].shape[-1])), torch.empty_like(out)
            for start in range(0, out.shape[-1], step):
                stop = min(start + step, out.shape[-1])
                rows = self.rounded(read_rows(head.folder, head.tensor, start, stop), blocks)
                logits[..., start:stop] = torch.nn.functional.linear(args[0], rows)
            return logits

        return hook

    def weighed(self, blocks: Blocks) -> Callable[..., None]:
        kept: list[Any] = []  # the same rows at every call

        def hook(module: Any, _args: Any) -> None:
            kept.extend([] if kept else [self.rounded(module.weight, blocks)])
            module.weight.copy_(kept[0])

        return hook
