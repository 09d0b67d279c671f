"""modules: the patched modules that are traced, against upstream's unpatched model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from builder.graph.modules import Embeddings, PackedEmbeddings, PaddedEmbeddings, TextDecoder, VisionEncoder
from patches import patch, patches_for
from patches.registry import applied
from patches.tiny import assert_close, tiny_model

pytestmark = pytest.mark.torch

HIDDEN, LEVELS, LAYERS, IMAGE = 48, 2, 3, 120
GRID = torch.tensor([[1, 4, 6], [2, 4, 4]])  # 24 and 32 patches, 6 and 8 image tokens
BATCH, SEQ = 2, 13
TOLERANCE = 1e-5  # of a standard deviation, after three layers


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def vision_patched() -> Iterator[None]:
    with applied([patch("vision_forward"), patch("vision_attention")]), torch.no_grad():
        yield


@contextmanager
def patched(model: Any, attention: str) -> Iterator[None]:
    """For the decoder. A patch that never runs is an error, so the vision encoder runs as well."""
    with applied(patches_for(attention)), torch.no_grad():
        VisionEncoder(model, packed=True)(random(4, 96), torch.tensor([[1, 2, 2]]))
        yield


def prompts() -> Tensor:
    """Two rows: image tokens in two runs of the first, one run of the second; 14 in all."""
    ids = torch.arange(BATCH * SEQ).view(BATCH, SEQ) % 100
    ids[0, 2:5] = ids[0, 7:10] = IMAGE
    ids[1, 3:11] = IMAGE
    return ids


def positions() -> Tensor:
    """[3, batch, seq], another place on each axis, as behind an image."""
    steps = torch.arange(SEQ).expand(3, BATCH, SEQ) * torch.tensor([1, 2, 3])[:, None, None]
    return steps + torch.tensor([0, 4])[None, :, None]


@pytest.mark.parametrize("grid", [GRID, GRID[:1], GRID.flip(0)], ids=["two", "one", "two, other order"])
def test_vision_features_are_upstreams(model: Any, grid: Tensor) -> None:
    pixels = random(int(grid.prod(1).sum()), 96)
    with torch.no_grad():
        want = model.model.visual(pixels, grid)
    with vision_patched():
        packed = VisionEncoder(model, packed=True)(pixels, grid)
        pooled, deepstack = VisionEncoder(model, packed=False)(pixels, grid)
    tokens = int(grid.prod(1).sum()) // 4
    assert (packed.shape, deepstack.shape) == ((tokens, (1 + LEVELS) * HIDDEN), (LEVELS, tokens, HIDDEN))
    assert_close("pooled", pooled, want.pooler_output, TOLERANCE)
    for level, features in enumerate(want.deepstack_features):
        assert_close(f"level {level}", deepstack[level], features, TOLERANCE)
    assert torch.equal(packed, torch.cat((pooled, *deepstack), dim=-1))


def test_without_deepstack_there_is_one_output() -> None:
    none = tiny_model()
    none.model.visual.deepstack_visual_indexes = []
    pixels = random(24, 96)
    with torch.no_grad():
        want = none.model.visual(pixels, GRID[:1]).pooler_output
    with vision_patched():
        for packed in (False, True):
            assert_close("pooled", VisionEncoder(none, packed)(pixels, GRID[:1]), want, TOLERANCE)


def test_embeddings_are_the_lookup(model: Any) -> None:
    ids = prompts()
    assert torch.equal(Embeddings(model)(ids), model.get_input_embeddings()(ids))


@pytest.mark.parametrize("levels", [0, LEVELS])
def test_padded_embeddings_are_the_lookup_and_zeros(model: Any, levels: int) -> None:
    got = PaddedEmbeddings(model, levels)(prompts())
    assert got.shape == (BATCH, SEQ, (1 + levels) * HIDDEN)
    assert torch.equal(got[..., :HIDDEN], Embeddings(model)(prompts()))
    assert not got[..., HIDDEN:].any()


def scattered(model: Any, ids: Tensor, features: Tensor) -> Tensor:
    """The expected output of `PackedEmbeddings`, token by token."""
    embeds = model.get_input_embeddings()(ids)
    out = torch.zeros(*ids.shape, features.shape[1])
    out[..., :HIDDEN] = embeds
    rows = iter(features)
    for place in (ids == IMAGE).nonzero().tolist():
        row = next(rows, None)
        if row is not None:
            out[tuple(place)] = row
    return out


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(14, id="one for each image token"),
        pytest.param(5, id="for fewer tokens than there are"),
        pytest.param(6, id="for the first row alone"),
        pytest.param(0, id="none"),
        pytest.param(20, id="more than there are tokens"),
    ],
)
def test_features_go_to_the_image_tokens_in_order(model: Any, count: int) -> None:
    ids, features = prompts(), random(count, (1 + LEVELS) * HIDDEN)
    got = PackedEmbeddings(model, IMAGE)(ids, features)
    assert torch.equal(got, scattered(model, ids, features))


@pytest.mark.parametrize("seq", [1, 5])
@pytest.mark.parametrize("count", [0, 3])
def test_text_takes_no_features(model: Any, seq: int, count: int) -> None:
    """A decode step, and features left over from the prompt."""
    ids = torch.arange(seq)[None] + 7
    got = PackedEmbeddings(model, IMAGE)(ids, random(count, (1 + LEVELS) * HIDDEN))
    assert torch.equal(got[..., :HIDDEN], model.get_input_embeddings()(ids))
    assert not got[..., HIDDEN:].any()


def test_packed_embeddings_without_deepstack(model: Any) -> None:
    ids, features = prompts(), random(14, HIDDEN)
    got = PackedEmbeddings(model, IMAGE)(ids, features)
    mask = (ids == IMAGE)[..., None].expand(-1, -1, HIDDEN)
    assert torch.equal(got, model.get_input_embeddings()(ids).masked_scatter(mask, features))


def upstream(model: Any, embeds: Tensor, mask: Tensor, deepstack: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Logits [batch, seq, vocab] and the caches of a single unpatched pass over all tokens."""
    where = prompts() == IMAGE
    with torch.no_grad():
        out = model.model.language_model(
            inputs_embeds=embeds,
            position_ids=positions(),
            attention_mask=mask,
            visual_pos_masks=None if deepstack is None else where,
            deepstack_visual_embeds=None if deepstack is None else [level[where] for level in deepstack],
            use_cache=True,
        )
        layers = out.past_key_values.layers
        return model.lm_head(out.last_hidden_state), [x for layer in layers for x in (layer.keys, layer.values)]


def decoded(
    decoder: TextDecoder, embeds: Tensor, deepstack: Tensor | None, mask: Tensor, cuts: tuple[int, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of each piece between `cuts`, on the past of the pieces before, and the final caches."""
    past = [torch.zeros(BATCH, 2, 0, 16)] * (2 * LAYERS)
    pieces = []
    for begin, end in zip((0, *cuts), (*cuts, SEQ), strict=True):
        part = slice(begin, end)
        given = [embeds[:, part]]
        if deepstack is not None and decoder.packed:
            given = [torch.cat((embeds, *deepstack), dim=-1)[:, part]]
        elif deepstack is not None:
            given.append(deepstack[:, :, part])
        logits, *past = decoder(*given, mask[:, :end], positions()[:, :, part], past)
        pieces.append(logits)
    return pieces, past


def drawn_inputs(levels: int) -> tuple[Tensor, Tensor | None]:
    """inputs_embeds [batch, seq, H], and DeepStack [D, batch, seq, H] with zeros at text tokens."""
    deepstack = random(levels, BATCH, SEQ, HIDDEN, seed=1) * (prompts() == IMAGE)[..., None] if levels else None
    return random(BATCH, SEQ, HIDDEN), deepstack


@pytest.mark.parametrize("attention", ["eager", "fused"])
@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
@pytest.mark.parametrize("levels", [LEVELS, 0], ids=["deepstack", "none"])
@pytest.mark.parametrize("cuts", [(), (8, 12), (1,)], ids=["prefill", "prefill, chunk, step", "step, chunk"])
def test_the_decoder_is_upstreams(model: Any, attention: str, packed: bool, levels: int, cuts: tuple[int, ...]) -> None:
    embeds, deepstack = drawn_inputs(levels)
    mask = torch.ones(BATCH, SEQ, dtype=torch.int64)
    want, caches = upstream(model, embeds, mask, deepstack)
    with patched(model, attention):
        decoder = TextDecoder(model, levels, packed, fused=attention == "fused")
        pieces, present = decoded(decoder, embeds, deepstack, mask, cuts)
    if packed:
        assert [piece.shape[1] for piece in pieces] == [1] * len(pieces)
        assert_close("logits", torch.cat(pieces, 1), want[:, [end - 1 for end in (*cuts, SEQ)]], TOLERANCE)
    else:
        assert_close("logits", torch.cat(pieces, 1), want, TOLERANCE)
    for index, (got, cache) in enumerate(zip(present, caches, strict=True)):
        assert_close(f"cache {index}", got, cache, TOLERANCE)


def test_left_padding_is_masked_as_upstream_does(model: Any) -> None:
    embeds, deepstack = drawn_inputs(LEVELS)
    mask = torch.ones(BATCH, SEQ, dtype=torch.int64)
    mask[1, :4] = 0
    want, _ = upstream(model, embeds, mask, deepstack)
    with patched(model, "eager"):
        pieces, _ = decoded(TextDecoder(model, LEVELS, packed=False, fused=False), embeds, deepstack, mask, (8, 12))
    got = torch.cat(pieces, 1)
    assert_close("logits", got[0], want[0], TOLERANCE)
    assert_close("logits behind the padding", got[1, 4:], want[1, 4:], TOLERANCE)


@pytest.mark.parametrize("attention", ["eager", "fused"])
def test_positions_beyond_the_last_token_are_clamped_if_bounded(model: Any, attention: str) -> None:
    """A row with padding on the left has fewer tokens, and so a lower bound."""
    embeds, _ = drawn_inputs(0)
    mask = torch.ones(BATCH, SEQ, dtype=torch.int64)
    mask[1, :4] = 0
    far = torch.arange(SEQ).expand(3, BATCH, SEQ) * 3
    near = torch.minimum(far, torch.tensor([SEQ - 1, SEQ - 5])[None, :, None])
    past = [torch.zeros(BATCH, 2, 0, 16)] * (2 * LAYERS)
    with patched(model, attention):
        want, *_ = TextDecoder(model, 0, True, attention == "fused")(embeds, mask, near, past)
        bounded = TextDecoder(model, 0, True, attention == "fused", bounded=True)
        got, *_ = bounded(embeds, mask, far, past)
        same, *_ = bounded(embeds, mask, near, past)
        without, *_ = TextDecoder(model, 0, True, attention == "fused")(embeds, mask, far, past)
    assert torch.equal(got, want)
    assert torch.equal(same, want)
    assert not torch.allclose(without, want)


@pytest.mark.parametrize("level", range(LEVELS))
@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
def test_a_deepstack_level_that_is_lost_shows(model: Any, level: int, packed: bool) -> None:
    embeds, deepstack = drawn_inputs(LEVELS)
    assert deepstack is not None
    mask = torch.ones(BATCH, SEQ, dtype=torch.int64)
    want, _ = upstream(model, embeds, mask, deepstack)
    deepstack[level] = 0
    with patched(model, "eager"):
        decoder = TextDecoder(model, LEVELS, packed, fused=False)
        pieces, _ = decoded(decoder, embeds, deepstack, mask, ())
    with pytest.raises(AssertionError, match="of a standard deviation, at most"):
        assert_close("logits", pieces[0][:, -1:], want[:, -1:], 1e-2)


@pytest.mark.parametrize("attention", ["eager", "fused"])
def test_from_pixels_to_logits(model: Any, attention: str) -> None:
    """The three packed modules in sequence against upstream's full model."""
    ids, pixels = prompts()[:, :11], random(56, 96)
    ids[0] = torch.tensor([1, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, 2, 3, 4, 5])
    mask, places = torch.ones_like(ids), positions()[:, :, :11]
    with torch.no_grad():
        want = model(
            input_ids=ids, attention_mask=mask, position_ids=places, pixel_values=pixels, image_grid_thw=GRID
        ).logits
    past = [torch.zeros(BATCH, 2, 0, 16)] * (2 * LAYERS)
    with applied(patches_for(attention)), torch.no_grad():
        features = VisionEncoder(model, packed=True)(pixels, GRID)
        embeds = PackedEmbeddings(model, IMAGE)(ids, features)
        decoder = TextDecoder(model, LEVELS, packed=True, fused=attention == "fused")
        logits, *_ = decoder(embeds, mask, places, past)
    assert_close("logits", logits, want[:, -1:], TOLERANCE)
