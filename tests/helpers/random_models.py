"""Small random architectures and inputs, and the comparison of implementations with PyTorch.

The same seed gives the same inputs, all valid for the model.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from builder.checkpoint.load import Checkpoint
from builder.targets.clients.pipeline import Settings, position_ids
from builder.verify.graphs.sessions import Past, merged
from builder.verify.report.gates import Gate, compare_close
from builder.verify.tolerances import FP32

if TYPE_CHECKING:
    from builder.reference.model import Reference

Array = npt.NDArray[Any]
TEXT_TOKENS = 3900  # ordinary tokens of the miniature's tokenizer; special tokens follow
ROPES: tuple[Mapping[str, Any], ...] = (
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "linear", "rope_theta": 50000.0, "factor": 2.0},
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256},
    {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
)


def architecture(seed: int) -> dict[str, Any]:
    """Arguments of `write_checkpoint`."""
    rng = random.Random(seed)
    kv_heads, layers, depth, vision_heads = (rng.randint(1, most) for most in (3, 4, 5, 3))
    levels = rng.randint(0, min(layers, depth, 3))
    text = {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * rng.randint(1, 3),
        "head_dim": rng.choice((8, 16, 24, 32, 64)),
        "hidden_size": 8 * rng.randint(2, 12),
        "intermediate_size": 8 * rng.randint(2, 12),
        "num_hidden_layers": layers,
        "attention_bias": rng.random() < 0.3,
        "rms_norm_eps": rng.choice((1e-6, 1e-5)),
    }
    vision = {
        "depth": depth,
        "num_heads": vision_heads,
        "hidden_size": vision_heads * 4 * rng.randint(2, 6),
        "intermediate_size": 8 * rng.randint(2, 10),
        "num_position_embeddings": rng.randint(2, 12) ** 2,
        "patch_size": rng.choice((4, 8, 14, 16)),
        "spatial_merge_size": rng.randint(1, 3),
        "temporal_patch_size": rng.randint(1, 2),
    }
    return {
        "seed": seed,
        "text": text,
        "vision": vision,
        "tied": rng.random() < 0.5,
        "deepstack": tuple(rng.sample(range(depth), levels)),
        "dtype": rng.choice(("bfloat16", "float16", "float32")),
        "shards": rng.randint(1, 3),
        "rope": ROPES[seed % len(ROPES)],
        "legacy": rng.random() < 0.3,
    }


@dataclass(frozen=True)
class Input:
    """A prompt, or frames without a prompt.

    Args:
        input_ids: [1, seq].
        pixel_values: [patches, channels·temporal·patch²]; no rows without images.
        image_grid_thw: [images, 3]; each image has one frame, as in a prompt.
        frames: [films, 3], of several frames each, for the vision encoder alone.
        cuts: where a prefill is cut into pieces.
    """

    input_ids: Array
    pixel_values: Array
    image_grid_thw: Array
    frames: Array
    cuts: tuple[int, ...]


def drawn_input(checkpoint: Checkpoint, seed: int) -> Input:
    """Text with up to three images, separate or adjacent."""
    rng, vision = random.Random(seed), checkpoint.vision

    def grids(count: int, frames: int) -> Array:
        side = vision.merge_size
        rows = [(rng.randint(1, frames), side * rng.randint(1, 4), side * rng.randint(1, 4)) for _ in range(count)]
        return np.array(rows, np.int64).reshape(-1, 3)

    def words(least: int) -> list[int]:
        return [rng.randrange(TEXT_TOKENS) for _ in range(rng.randint(least, 6))]

    grid = grids(rng.randint(0, 3), 1)
    ids = words(1)
    for count in grid.prod(1) // vision.merge_size**2:
        image = [checkpoint.image_token_id] * int(count)
        ids += [checkpoint.vision_start_token_id, *image, checkpoint.vision_end_token_id, *words(0)]
    ids += words(2)
    cuts = sorted(rng.sample(range(1, len(ids)), min(rng.randint(0, 2), len(ids) - 1)))
    pixels = drawn_pixels(checkpoint, grid, seed)
    return Input(np.array([ids], np.int64), pixels, grid, grids(rng.randint(1, 2), 3), tuple(cuts))


def drawn_pixels(checkpoint: Checkpoint, grid: Array, seed: int) -> Array:
    """Noise for these grids, as `pixel_values`."""
    vision = checkpoint.vision
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return np.random.default_rng(seed).standard_normal((int(grid.prod(1).sum()), width), np.float32)


class Computed(Protocol):
    """What computes the three graphs: sessions (`builder.verify.graphs.sessions.Graphs`), or the modules that are
    traced."""

    @property
    def packed(self) -> bool: ...

    def vision(self, pixels: Array, grid: Array) -> tuple[Array, list[Array]]: ...

    def embed(
        self, ids: Array, main: Array, levels: Sequence[Array], image_token_id: int
    ) -> tuple[Array, list[Array]]: ...

    def decode(
        self, embeds: Array, levels: Sequence[Array], positions: Array, mask: Array, past: Past | None = None
    ) -> tuple[Array, Past]: ...


@dataclass(frozen=True)
class Wanted:
    """PyTorch's results for an `Input`.

    Args:
        images, frames: main features [tokens, H] and the DeepStack levels.
        inputs: the decoder's, with the features merged: [1, seq, H], and as many for each level.
        logits: [1, seq, vocab].
    """

    images: tuple[Array, list[Array]]
    frames: tuple[Array, list[Array]]
    inputs: tuple[Array, list[Array]]
    logits: Array


def wanted(reference: Reference, given: Input) -> Wanted:
    """Compute with unpatched upstream code."""
    from builder.reference.model import Prompt

    checkpoint = reference.checkpoint
    none = np.zeros((0, checkpoint.text.hidden), np.float32)
    images = (none, [none] * len(checkpoint.vision.deepstack))
    pixels = grid = None
    if len(given.image_grid_thw):
        pixels, grid = given.pixel_values, given.image_grid_thw
        images = reference.vision(pixels, grid)
    prompt = Prompt(given.input_ids, pixels, grid, positions(checkpoint, given))
    frames = reference.vision(drawn_pixels(checkpoint, given.frames, 1), given.frames)
    mask = given.input_ids == checkpoint.image_token_id
    inputs = merged(reference.embed(given.input_ids), mask, *images)
    return Wanted(images, frames, inputs, reference.logits(prompt, ())[None])


def positions(checkpoint: Checkpoint, given: Input) -> Array:
    """Return positions [3, 1, seq] by our own code; upstream computes its own."""
    image, merge = checkpoint.image_token_id, checkpoint.vision.merge_size
    settings = Settings("", "", "", "", image, "", merge, (), 0, 0, checkpoint.text.hidden)
    return position_ids(given.input_ids, given.image_grid_thw, settings)[0]


def compared(graphs: Computed, checkpoint: Checkpoint, given: Input, want: Wanted) -> list[Gate]:
    """Features, levels, embeddings and logits of every piece between the cuts."""
    gates: list[Gate] = []
    sides = [("frames", drawn_pixels(checkpoint, given.frames, 1), given.frames, want.frames)]
    if len(given.image_grid_thw):
        sides.append(("images", given.pixel_values, given.image_grid_thw, want.images))
    for name, pixels, grid, (main, levels) in sides:
        got, got_levels = graphs.vision(pixels, grid)
        assert len(got_levels) == len(levels)
        gates.append(compare_close("image features", name, got, main, FP32))
        pairs = zip(got_levels, levels, strict=True)
        gates += [
            compare_close("deepstack features", f"{name}, level {n}", a, b, FP32) for n, (a, b) in enumerate(pairs)
        ]
    main, levels = want.images
    embeds, inputs = graphs.embed(given.input_ids, main, levels, checkpoint.image_token_id)
    pairs = zip((embeds, *inputs), (want.inputs[0], *want.inputs[1]), strict=True)
    gates += [
        compare_close("embeddings", f"level {n - 1}" if n else "main", a, b, FP32) for n, (a, b) in enumerate(pairs)
    ]
    places, past, ends = positions(checkpoint, given), None, (*given.cuts, given.input_ids.shape[1])
    for begin, end in zip((0, *given.cuts), ends, strict=True):
        part, mask = slice(begin, end), np.ones((1, end), np.int64)
        pieces = [level[:, part] for level in inputs]
        got, past = graphs.decode(embeds[:, part], pieces, places[:, :, part], mask, past)
        expected = want.logits[:, end - 1 : end] if graphs.packed else want.logits[:, part]
        # Over all logits: those of a single position can have a smaller spread.
        scale = float(want.logits.std() / expected.std())
        gates.append(compare_close("decoder prefill", f"tokens {begin}–{end}", got, expected, FP32 * max(1.0, scale)))
    return gates
