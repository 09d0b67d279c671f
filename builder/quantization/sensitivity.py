"""Which matrices are worth more bits, measured.

In: a checkpoint, and a recipe that stores matrices in 4 bits. Out: what each group of them costs when it alone is
rounded (KL divergence of the next token against PyTorch in fp32, in nats). Guaranteed: groups are what becomes one
matmul (q, k and v; gate and up), the embeddings with a tied head, or a block of the vision encoder; one layer is in
memory at a time; nothing of a held-out set is used.
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
    """Matrices that are stored alike.

    Args:
        more: bytes that 8 bits take beyond 4.
    """

    tensors: tuple[str, ...]
    more: int

    @property
    def name(self) -> str:
        """What its tensors are called, the common part once."""
        first = self.tensors[0].removesuffix(".weight")
        if found := BLOCK.match(first):
            return found[1]
        path, _, _ = first.rpartition(".")
        return f"{path}.{'+'.join(name.removesuffix('.weight').rpartition('.')[2] for name in self.tensors)}"


@dataclass(frozen=True)
class Sensitivity:
    """What it costs to round a group alone: the mean KL divergence over all positions, in nats."""

    group: Group
    kl: float

    @property
    def per_byte(self) -> float:
        """What a byte of 8 bits saves at most."""
        return self.kl / self.group.more


def groups(checkpoint: Checkpoint, storages: Mapping[str, WeightFormat]) -> list[Group]:
    """Everything that is stored in 4 bits."""
    members: dict[str, list[str]] = {}
    for name, storage in storages.items():
        if storage.blocks.bits == LOW:
            members.setdefault(_key(name), []).append(name)
    return [
        Group(tuple(names), sum(math.prod(checkpoint.tensors[name].shape) for name in names) * (HIGH - LOW) // 8)
        for names in members.values()
    ]


def estimate_sensitivities(
    checkpoint: Checkpoint, rules: Sequence[Rule], positions: int, advance: Callable[[], None] = lambda: None
) -> list[Sensitivity]:
    """The sensitivity of every group, the largest KL divergence first.

    Args:
        positions: tokens whose distributions are compared, at least; fewer where there are no more.
        advance: called after each group.

    Raises:
        RecipeError: the rules store nothing in 4 bits.
    """
    storages = resolve(rules, checkpoint.tensors)
    wanted = groups(checkpoint, storages)
    if not wanted:
        raise RecipeError(
            "the recipe stores nothing in 4 bits",
            expected='rules with store = "int4"',
            found=f"{len(storages)} matrices in 8 bits" if storages else "no rules",
            next="--recipe int4",
        )
    own = _Measuring.of(checkpoint, storages, positions)
    found = []
    with own.reference.torch.no_grad():
        exact = own.distributions(own.behind(0, own.begun()))
        for group in sorted(wanted, key=lambda one: own.layer_of(one)):
            found.append(Sensitivity(group, own.divergence(exact, group)))
            advance()
    return sorted(found, key=lambda one: -one.kl)


def _key(name: str) -> str:
    if found := BLOCK.match(name):
        return found[1]
    path, _, module = name.removesuffix(".weight").rpartition(".")
    return next((f"{path}.{names}" for names in TOGETHER if module in names), name)


def _asked(
    reference: Reference, checkpoint: Checkpoint, positions: int
) -> Iterator[tuple[Prompt, tuple[int, ...], int]]:
    """Prompts with their answers, and how many last positions of each are compared: all behind the last picture."""
    left = positions
    for prompt, answer in calibration_prompts(reference, checkpoint):
        ids = prompt.input_ids[0]
        pictures = np.flatnonzero(ids == reference.image_token_id)
        keep = len(ids) + len(answer) - (int(pictures[-1]) + 1 if len(pictures) else 0)
        yield prompt, answer, keep
        left -= keep
        if left <= 0:
            return


@dataclass
class _Measuring:
    """One measurement: what is asked, and the exact streams as they enter the layer that has been reached."""

    checkpoint: Checkpoint
    storages: Mapping[str, WeightFormat]
    reference: Reference
    asked: list[tuple[Prompt, tuple[int, ...], int]]
    reached: int = 0
    streams: list[Stream] = field(default_factory=list)

    @classmethod
    def of(cls, checkpoint: Checkpoint, storages: Mapping[str, WeightFormat], positions: int) -> _Measuring:
        reference = Reference(checkpoint, streamed=True)
        return cls(checkpoint, storages, reference, list(_asked(reference, checkpoint, positions)))

    def layer_of(self, group: Group) -> int:
        """The decoder layer that a group is in; -1 for what lies before the first."""
        found = LAYER.match(group.tensors[0])
        return int(found[1]) if found else -1

    def begun(self) -> list[Stream]:
        return begin(self.reference, ((prompt, answer) for prompt, answer, _ in self.asked))

    def behind(self, first: int, streams: Sequence[Stream], rounded: Sequence[str] = ()) -> list[Stream]:
        """The streams behind the last layer, from layer `first` on, of which these matrices are rounded."""
        for index in range(first, self.checkpoint.text.layers):
            layer = loaded_layer(self.reference, self.checkpoint, index)
            for name in rounded if index == first else ():
                weight = layer.get_submodule(name.removesuffix(".weight").partition(f"layers.{index}.")[2]).weight
                weight.copy_(self.rounded(weight, self.storages[name].blocks))
            streams = [replace(one, hidden=through(layer, one, index, add=True)) for one in streams]
        return list(streams)

    def distributions(self, streams: Sequence[Stream]) -> list[Array]:
        """[keep, vocab] each, log-probabilities in fp32: they are held for all prompts."""
        model = self.reference.model
        ends = [one.hidden[:, -keep:] for one, (_, _, keep) in zip(streams, self.asked, strict=True)]
        logits = (model.lm_head(model.model.language_model.norm(end))[0].numpy() for end in ends)
        return [log_softmax(one).astype(np.float32) for one in logits]

    def divergence(self, exact: Sequence[Array], group: Group) -> float:
        """The mean over all positions, in nats."""
        layer = self.layer_of(group)
        if layer < 0:
            with self.hooked(group):
                got = self.distributions(self.behind(0, self.begun()))
        else:
            self.reach(layer)
            got = self.distributions(self.behind(layer, self.streams, group.tensors))
        kl = [kl_divergence(p, q) for p, q in zip(exact, got, strict=True)]
        return float(np.concatenate(kl).mean())

    def reach(self, layer: int) -> None:
        """Takes the exact streams to the entry of a layer."""
        if not self.streams:
            self.streams = self.begun()
        while self.reached < layer:
            own = loaded_layer(self.reference, self.checkpoint, self.reached)
            self.streams = [replace(one, hidden=through(own, one, self.reached, add=True)) for one in self.streams]
            self.reached += 1

    def rounded(self, rows: Any, blocks: Blocks) -> Any:
        """Rows as their codes represent them: scales are searched, errors are not compensated."""
        searched = Blocks(blocks.bits, blocks.size, blocks.zero_points, "mse")
        return self.reference.torch.from_numpy(dequantize(quantize(rows.numpy(), searched)))

    @contextmanager
    def hooked(self, group: Group) -> Iterator[None]:
        """The embeddings, the head or a part of the vision encoder rounded."""
        model = self.reference.model
        with ExitStack() as hooks:
            for name in group.tensors:
                blocks = self.storages[name].blocks
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
