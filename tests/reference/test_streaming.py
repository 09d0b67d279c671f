"""Compare the reference that streams its weights with the reference that holds them all.

The layers run the same kernels on the same values and are bit-equal. So is the head while its blocks are multiples of
`HEAD_ROWS`; as that depends on the matrix library, logits may differ here by 1e-6 of their standard deviation.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from builder.checkpoint.load import open_checkpoint
from builder.checkpoint.tensors import EMBEDDINGS, LM_HEAD
from builder.reference import streaming
from builder.reference.model import Prompt, Reference, Trace
from builder.util.errors import CheckpointError, WeightError
from tests.helpers.checkpoints import MINIATURE, write_checkpoint
from tests.helpers.processes import python

pytestmark = pytest.mark.torch

Array = npt.NDArray[Any]
SHAPES = ("miniature", "untied", "biased", "deepstack0", "patch14merge3")
ANSWER = (5, 600, 7)
WIDE = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
WIDE_LAYER = 4 * (2 * 512 * 512 + 2 * 256 * 512 + 3 * 6144 * 512)  # bytes in fp32
PEAKS = """
import sys
from pathlib import Path
from builder.checkpoint.load import open_checkpoint
from builder.util.peak_memory import peak_rss, reset_peak
from builder.reference.model import Reference

for streamed in (True, False):
    reference = Reference(open_checkpoint(Path(sys.argv[1])), streamed=streamed)
    reset_peak()
    reference.logits(reference.prepare("Which number is it?", []), ())
    print(peak_rss())
"""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A checkpoint loaded completely and streamed, and a prompt with two images."""

    loaded: Reference
    streamed: Reference
    prompt: Prompt


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> Pair:
    folder = MINIATURE if request.param == "miniature" else checkpoint(request.param)
    return open_pair(folder)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split every matrix and head into several blocks, the last one partial."""
    monkeypatch.setattr(streaming, "READ_BYTES", 1001)
    monkeypatch.setattr(streaming, "HEAD_BYTES", 100_000)


def open_pair(folder: Path) -> Pair:
    opened = open_checkpoint(folder)
    loaded = Reference(opened)
    return Pair(loaded, Reference(opened, streamed=True), two_images(loaded))


def two_images(reference: Reference) -> Prompt:
    """Return a prompt with two images of different sizes and random pixels."""
    vision = reference.checkpoint.vision
    grid = np.array([[1, 4, 6], [1, 2, 2]], np.int64) * [1, vision.merge_size, vision.merge_size]
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = np.random.default_rng(0).standard_normal((int(grid.prod(1).sum()), width), np.float32)
    return reference.with_pixels("Which number is it?", 2, pixels, grid)


def close(got: Array, want: Array) -> bool:
    """Whether logits are equal within the tolerance of the module docstring."""
    return got.shape == want.shape and bool(np.abs(got - want).max() <= 1e-6 * want.std())


def all_on_meta(reference: Reference) -> bool:
    """Whether all weights are on the meta device."""
    return all(parameter.is_meta for parameter in reference.model.parameters())


def images(prompt: Prompt) -> tuple[Array, Array]:
    assert prompt.pixel_values is not None
    assert prompt.image_grid_thw is not None
    return prompt.pixel_values, prompt.image_grid_thw


def test_the_settings_equal_those_of_the_loaded_model(pair: Pair) -> None:
    got, want = pair.streamed.model, pair.loaded.model
    assert got.config._attn_implementation == want.config._attn_implementation == "sdpa"
    assert (got.device, got.dtype) == (want.device, want.dtype)
    assert got.generation_config.to_dict() == want.generation_config.to_dict()
    assert not got.training
    got_buffers, want_buffers = dict(got.named_buffers()), dict(want.named_buffers())
    assert got_buffers.keys() == want_buffers.keys()
    assert all(torch.equal(got_buffers[name], want_buffers[name]) for name in want_buffers)


def test_the_prompt_is_the_same(pair: Pair) -> None:
    got = two_images(pair.streamed)
    assert np.array_equal(got.input_ids, pair.prompt.input_ids)
    assert np.array_equal(got.position_ids, pair.prompt.position_ids)


def test_the_features_are_bit_equal(pair: Pair) -> None:
    got, got_levels = pair.streamed.vision(*images(pair.prompt))
    want, want_levels = pair.loaded.vision(*images(pair.prompt))
    assert np.array_equal(got, want)
    assert len(got_levels) == len(want_levels) == len(pair.loaded.checkpoint.vision.deepstack)
    assert all(map(np.array_equal, got_levels, want_levels))
    assert all_on_meta(pair.streamed)


def test_the_embeddings_are_bit_equal(pair: Pair) -> None:
    ids = np.array([[0, 4095, 7], [7, 7, 1]], np.int64)
    assert np.array_equal(pair.streamed.embed(ids), pair.loaded.embed(ids))


@pytest.mark.parametrize("row", [4096, -1])
def test_a_token_without_a_row_is_refused_as_upstream_does(row: int) -> None:
    for reference in (Reference(open_checkpoint(MINIATURE), streamed=flag) for flag in (True, False)):
        with pytest.raises(IndexError):
            reference.embed(np.array([[row]], np.int64))


def test_the_logits_are_equal(pair: Pair) -> None:
    assert close(pair.streamed.logits(pair.prompt, ANSWER), pair.loaded.logits(pair.prompt, ANSWER))
    assert all_on_meta(pair.streamed)


def test_the_logits_without_an_image_are_equal(pair: Pair) -> None:
    prompt = pair.streamed.prepare("Which number is it?", [])
    assert close(pair.streamed.logits(prompt, ()), pair.loaded.logits(prompt, ()))


def test_the_decoder_alone_is_equal_in_a_batch(pair: Pair) -> None:
    embeds = pair.loaded.embed(np.random.default_rng(1).integers(0, 4096, (2, 9), np.int64))
    positions = np.stack([np.arange(9)[None] * [[1], [2]] + axis * np.arange(9) for axis in range(3)]).astype(np.int64)
    assert close(pair.streamed.text_logits(embeds, positions), pair.loaded.text_logits(embeds, positions))


def test_the_answer_is_the_same(pair: Pair) -> None:
    got, want = pair.streamed.generate(pair.prompt, 8, 8), pair.loaded.generate(pair.prompt, 8, 8)
    assert len(got.tokens) == 8
    assert got.tokens == want.tokens
    assert got.margins == pytest.approx(want.margins, abs=1e-4)
    assert all_on_meta(pair.streamed)


def test_the_hidden_states_are_bit_equal(pair: Pair) -> None:
    got, want = (reference.hidden_states(pair.prompt, ANSWER) for reference in (pair.streamed, pair.loaded))
    for name in ("vision", "features", "decoder"):
        assert len(getattr(got, name)) == len(getattr(want, name)) > 0
        assert all(map(np.array_equal, getattr(got, name), getattr(want, name))), name
    assert close(got.logits, want.logits)


def test_hidden_states_are_the_inputs_of_upstream_modules(pair: Pair) -> None:
    """Check each against the module that takes it; the decoder's include DeepStack, at image tokens only."""
    outputs: list[Any] = []
    hooks = [
        layer.register_forward_hook(lambda _layer, _args, out: outputs.append(out[0].numpy()))
        for layer in pair.loaded.model.model.language_model.layers
    ]
    trace = pair.loaded.hidden_states(pair.prompt, ANSWER)
    for hook in hooks:
        hook.remove()
    main, levels = pair.loaded.vision(*images(pair.prompt))
    assert all(map(np.array_equal, trace.features, (main, *levels)))
    assert np.array_equal(trace.logits, pair.loaded.logits(pair.prompt, ANSWER))
    facts = pair.loaded.checkpoint
    assert len(trace.vision) == facts.vision.depth
    image = np.append(pair.prompt.input_ids[0] == facts.image_token_id, [False] * len(ANSWER))
    for index, (given, output) in enumerate(zip(trace.decoder, outputs, strict=True)):
        want = output.copy()
        if index < len(levels):
            want[image] += levels[index]
        assert np.array_equal(given[0], want)
    with torch.no_grad():
        merged = pair.loaded.model.model.visual.merger(torch.from_numpy(trace.vision[-1]))
        normed = pair.loaded.model.model.language_model.norm(torch.from_numpy(trace.decoder[-1]))
        logits = pair.loaded.model.lm_head(normed)[0]
    assert np.array_equal(merged.numpy(), main)
    assert np.array_equal(logits.numpy(), trace.logits)


def test_hidden_states_without_an_image_have_no_vision(pair: Pair) -> None:
    trace: Trace = pair.streamed.hidden_states(pair.streamed.prepare("Which number is it?", []))
    assert trace.vision == trace.features == ()
    assert len(trace.decoder) == pair.streamed.checkpoint.text.layers


def test_only_the_last_logits_are_kept(pair: Pair) -> None:
    """A matmul of fewer rows differs in the last bits, in the loaded model too: up to 4e-6 were measured."""
    got, want = (
        reference.hidden_states(pair.prompt, ANSWER, keep=2).logits for reference in (pair.streamed, pair.loaded)
    )
    every = pair.loaded.logits(pair.prompt, ANSWER)
    assert close(got, want)
    assert got.shape == (2, every.shape[1])
    assert np.abs(got - every[-2:]).max() <= 1e-5 * every.std()


def test_one_part_at_a_time_is_in_memory(pair: Pair) -> None:
    """Before each leaf module: at most one part is loaded; over a forward, every weight once, with the right values."""
    want = dict(pair.loaded.model.named_parameters())
    model = pair.streamed.model
    seen: dict[str, frozenset[str]] = {}

    def look(*_: object) -> None:
        real = {name: parameter for name, parameter in model.named_parameters() if not parameter.is_meta}
        assert all(torch.equal(parameter, want[name]) for name, parameter in real.items())
        seen.update(dict.fromkeys(real, frozenset(real)))

    hooks = [module.register_forward_pre_hook(look) for module in model.modules() if not list(module.children())]
    pair.streamed.logits(pair.prompt, ())
    for hook in hooks:
        hook.remove()
    assert seen.keys() == want.keys() - {EMBEDDINGS, LM_HEAD}
    together = set(seen.values())
    vision, text = pair.loaded.checkpoint.vision, pair.loaded.checkpoint.text
    # Around the blocks: patch and position embedding, mergers; around the layers: the norm.
    assert len(together) == vision.depth + 3 + len(vision.deepstack) + text.layers + 1
    assert sum(map(len, together)) == len(seen)


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Record (tensor, start, stop) of every read."""
    reads: list[tuple[str, int, int]] = []
    read = streaming.read_rows

    def recorded(folder: Path, tensor: Any, start: int, stop: int) -> Any:
        reads.append((tensor.name, start, stop))
        return read(folder, tensor, start, stop)

    monkeypatch.setattr(streaming, "read_rows", recorded)
    return reads


def test_only_the_requested_rows_are_read(rows_read: list[tuple[str, int, int]]) -> None:
    Reference(open_checkpoint(MINIATURE), streamed=True).embed(np.array([[900, 3, 900]], np.int64))
    assert rows_read == [(EMBEDDINGS, 3, 4), (EMBEDDINGS, 900, 901)]


def test_the_head_is_read_in_blocks(checkpoint: Callable[[str], Path], rows_read: list[tuple[str, int, int]]) -> None:
    reference = Reference(open_checkpoint(checkpoint("untied")), streamed=True)
    reference.logits(reference.prepare("Which number is it?", []), ())
    blocks = [(start, stop) for name, start, stop in rows_read if name == LM_HEAD]
    # 384 rows of 64 values are the most that 100,000 bytes hold, and a multiple of 64.
    assert blocks == [(start, min(start + 384, 4096)) for start in range(0, 4096, 384)]


@pytest.mark.parametrize("file", range(3))
def test_a_truncated_file_is_an_error_and_nothing_stays_loaded(sharded: Path, file: int) -> None:
    pair = open_pair(sharded)
    want = pair.streamed.logits(pair.prompt, ())
    shard = sorted(sharded.glob("*.safetensors"))[file]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=shard.name) as caught:
        pair.streamed.logits(pair.prompt, ())
    assert caught.value.found == f"{len(content) - 1} bytes"
    assert all_on_meta(pair.streamed)
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        pair.streamed.generate(pair.prompt, 2)
    shard.write_bytes(content)
    assert np.array_equal(pair.streamed.logits(pair.prompt, ()), want)


def test_missing_and_extra_tensors_are_refused() -> None:
    opened = open_checkpoint(MINIATURE)
    norm = "model.language_model.norm.weight"
    for tensors, name in (
        ({key: tensor for key, tensor in opened.tensors.items() if key != norm}, norm),
        ({**opened.tensors, "model.another.weight": opened.tensors[norm]}, "model.another.weight"),
    ):
        with pytest.raises(WeightError, match=name):
            streaming.streamed_model(dataclasses.replace(opened, tensors=tensors))


def test_peak_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    streamed_peaks, loaded_peaks = [], []
    for layers in (2, 10):
        text = {**WIDE, "num_hidden_layers": layers, "intermediate_size": 6144}
        folder = write_checkpoint(tmp_path / str(layers), text=text, deepstack=(1, 2), dtype="bfloat16")
        done = python("-c", PEAKS, folder, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        shutil.rmtree(folder)
        first, second = map(int, done.stdout.split())
        streamed_peaks.append(first)
        loaded_peaks.append(second)
    assert streamed_peaks[1] - streamed_peaks[0] < WIDE_LAYER, streamed_peaks
    # The control: a completely loaded model grows by eight layers.
    assert loaded_peaks[1] - loaded_peaks[0] > 7 * WIDE_LAYER, loaded_peaks
