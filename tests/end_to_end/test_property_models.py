"""Random architectures × random inputs, against PyTorch: the traced modules always, exported graphs with `-m slow`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from builder.checkpoint.load import Checkpoint, open_checkpoint
from builder.checkpoint.source import parse_source
from builder.stages.engine.build import Build
from builder.stages.engine.execute import execute
from builder.targets.recipe import Target
from builder.targets.recipe_file import load_recipe
from builder.verify.graphs.sessions import Graphs, Past, merged
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.random_models import Array, Computed, architecture, compared, drawn_input, wanted

if TYPE_CHECKING:
    from builder.reference.model import Reference

pytestmark = pytest.mark.torch

INPUTS = 25  # an architecture
SAMPLE, MANY = range(3), range(100, 116)
EXPORTED = range(200, 208)
TARGETS = (Target("genai", "fused"), Target("onnxruntime", "eager"))


class Modules:
    """The modules that are traced, under their patches, in eager PyTorch; `Computed` of one target."""

    def __init__(self, reference: Reference, target: Target) -> None:
        from builder.targets.graphs import module

        self.torch, self.checkpoint = reference.torch, reference.checkpoint
        self.packed, self.hidden = target.runtime == "genai", reference.checkpoint.text.hidden
        names = ("vision_encoder", "embeddings", "model")
        self.parts = [module(reference.checkpoint, reference.model, name, target) for name in names]

    def vision(self, pixels: Array, grid: Array) -> tuple[Array, list[Array]]:
        found = self._call(0, pixels, grid)
        if self.packed:
            main, *levels = self._unpacked(found[0])
            return main, levels
        return found[0], list(found[1]) if len(found) > 1 else []

    def embed(self, ids: Array, main: Array, levels: Sequence[Array], image_token_id: int) -> tuple[Array, list[Array]]:
        if self.packed:
            main, *levels = self._unpacked(self._call(1, ids, np.concatenate([main, *levels], axis=1))[0])
            return main, list(levels)
        return merged(self._call(1, ids)[0], ids == image_token_id, main, levels)

    def decode(
        self, embeds: Array, levels: Sequence[Array], positions: Array, mask: Array, past: Past | None = None
    ) -> tuple[Array, Past]:
        text = self.checkpoint.text
        empty = np.zeros((len(embeds), text.kv_heads, 0, text.head_dim), np.float32)
        past = {str(n): empty for n in range(2 * text.layers)} if past is None else past
        if self.packed:
            embeds, levels = np.concatenate([embeds, *levels], axis=-1), []
        given = [embeds, *([np.stack(levels)] if levels else []), mask, positions]
        logits, *present = self._call(2, *given, [self.torch.from_numpy(one.copy()) for one in past.values()])
        return logits, dict(zip(past, present, strict=True))

    def _unpacked(self, packed: Array) -> list[Array]:
        return [packed[..., at : at + self.hidden] for at in range(0, packed.shape[-1], self.hidden)]

    def _call(self, part: int, *given: Any) -> list[Array]:
        tensors = [self.torch.from_numpy(one.copy()) if isinstance(one, np.ndarray) else one for one in given]
        with self.torch.no_grad():
            found = self.parts[part](*tensors)
        return [one.numpy() for one in (found if isinstance(found, tuple) else (found,))]


@contextmanager
def patched(target: Target) -> Iterator[None]:
    from patches import patches_for
    from patches.registry import applied

    with applied(patches_for(target.attention)):
        yield


def opened(folder: Path, seed: int) -> Reference:
    from builder.reference.model import Reference

    return Reference(open_checkpoint(write_checkpoint(folder, **architecture(seed))))


def check(
    checkpoint: Checkpoint,
    reference: Reference,
    seed: int,
    count: int,
    within: Callable[[], Any],
    make: Callable[[], Computed],
) -> None:
    """`count` inputs; a failure says which architecture and which input."""
    given = [drawn_input(checkpoint, 1000 * seed + number) for number in range(count)]
    want = [wanted(reference, one) for one in given]
    with within():
        graphs = make()
        for number, (one, upstream) in enumerate(zip(given, want, strict=True)):
            failing = [gate for gate in compared(graphs, checkpoint, one, upstream) if not gate.ok]
            assert not failing, f"architecture {architecture(seed)}\ninput {number}: {one}\n{failing}"


@pytest.mark.parametrize("seed", [*SAMPLE, *(pytest.param(seed, marks=pytest.mark.slow) for seed in MANY)])
def test_the_traced_modules(tmp_path: Path, seed: int) -> None:
    reference, target = opened(tmp_path / "checkpoint", seed), TARGETS[seed % 2]
    count = INPUTS if seed in MANY else 5
    check(reference.checkpoint, reference, seed, count, lambda: patched(target), lambda: Modules(reference, target))


@pytest.mark.slow
@pytest.mark.parametrize("seed", EXPORTED)
def test_exported_graphs(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Beside one another, so that the stage `patch`, which is the same for all of a target, is made twice."""
    from contextlib import nullcontext

    outputs = tmp_path_factory.getbasetemp() / "exported"
    outputs.mkdir(exist_ok=True)
    reference, target = opened(outputs / f"checkpoint-{seed}", seed), TARGETS[seed % 2]
    checkpoint = reference.checkpoint
    recipe = replace(load_recipe("fp32"), targets=(target,))
    build = Build(parse_source(str(checkpoint.folder)), recipe, outputs / f"output-{seed}")
    execute(build, until="quantize")
    folder = build.folder("quantize") / target.runtime

    def load() -> Graphs:
        return Graphs.load(folder, target.runtime == "genai", checkpoint.text.hidden)

    check(checkpoint, reference, seed, INPUTS, nullcontext, load)


def test_a_model_that_differs_is_seen(tmp_path: Path) -> None:
    """The comparison fails where the last layer's weights are another model's."""
    reference, target = opened(tmp_path / "checkpoint", SAMPLE[0]), TARGETS[0]
    given = drawn_input(reference.checkpoint, 7)
    want = wanted(reference, given)
    with patched(target), reference.torch.no_grad():
        reference.model.model.language_model.norm.weight[0] += 0.1
        reference.model.model.visual.merger.linear_fc2.bias[0] += 0.1
        gates = compared(Modules(reference, target), reference.checkpoint, given, want)
    assert {gate.place for gate in gates if not gate.ok} >= {"image features", "decoder prefill"}
