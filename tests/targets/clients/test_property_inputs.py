"""Sizes, pixel values, token ids and positions of any images and texts, compared with simple formulas.

The formulas process one token or pixel at a time; tests marked torch compare with transformers.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from builder.checkpoint.load import open_checkpoint
from builder.targets.clients import pipeline
from builder.targets.clients.pipeline import ImageError, ImageSettings, Settings
from builder.targets.config_files import pipeline_settings, vision_processor
from tests.helpers.checkpoints import MINIATURE

pytestmark = pytest.mark.seconds

COMMON = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
MANY, SOME = settings(COMMON, max_examples=300), settings(COMMON, max_examples=40)
IMAGE, TEXT = 9, 1
VISION = st.builds(
    lambda patch, merge, frames, low, more: ImageSettings(
        low, low + more, patch, frames, merge, 255.0, (0.5, 0.4, 0.3), (0.5, 0.2, 0.3)
    ),
    st.sampled_from((4, 8, 14, 16)),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 70_000),
    st.integers(0, 300_000),
)
SIDE = st.integers(1, 5000)


def nearest_multiple(side: int, unit: int) -> int:
    """Round halves to the even multiple."""
    count, rest = divmod(side, unit)
    up = 2 * rest > unit or (2 * rest == unit and count % 2 == 1)
    return (count + up) * unit


@MANY
@given(SIDE, SIDE, VISION)
def test_sizes_in_integer_arithmetic(height: int, width: int, vision: ImageSettings) -> None:
    """At a bound: floor(side · √(bound / area) / unit) is the integer square root of a quotient."""
    unit = vision.patch_size * vision.merge_size
    assume(max(height, width) <= 200 * min(height, width))
    got = pipeline.target_size(height, width, vision)
    rounded = tuple(nearest_multiple(side, unit) for side in (height, width))
    area = math.prod(rounded)
    if vision.min_pixels <= area <= vision.max_pixels:
        assert got == rounded
        return
    shrinks = area > vision.max_pixels
    bound = vision.max_pixels if shrinks else vision.min_pixels
    for side, found in zip((height, width), got, strict=True):
        over, under = side**2 * bound, height * width * unit**2
        root = math.isqrt(over // under)
        exact = root**2 * under == over  # a float may then be on either side of it
        if shrinks:
            assert found in ({max(1, root) * unit} | ({max(1, root - 1) * unit} if exact else set()))
        else:
            assert found in ({root * unit, (root + 1) * unit} if exact else {(root + 1) * unit})


@MANY
@given(st.integers(1, 30), st.integers(6001, 100_000), VISION)
def test_images_that_are_too_long_are_rejected(short: int, long: int, vision: ImageSettings) -> None:
    for sides in ((short, long), (long, short)):
        with pytest.raises(ImageError, match="200 times"):
            pipeline.target_size(*sides, vision)


def placed(ids: list[int], grids: list[tuple[int, int, int]], merge: int) -> list[tuple[int, int, int]]:
    """Compute positions one token at a time."""
    left, at, positions = list(grids), 0, []
    index = 0
    while index < len(ids):
        if ids[index] != IMAGE:
            positions.append((at, at, at))
            at, index = at + 1, index + 1
            continue
        frames, height, width = left.pop(0)
        height, width = height // merge, width // merge
        for t in range(frames):
            for y in range(height):
                for x in range(width):
                    positions.append((at + t, at + y, at + x))
                    index += 1
        at += max(height, width)
    return positions


GRIDS = st.lists(st.tuples(st.just(1), st.integers(1, 6), st.integers(1, 6)), max_size=4)


@MANY
@given(GRIDS, st.integers(1, 3), st.data())
def test_positions_equal_the_formula(grids: list[tuple[int, int, int]], merge: int, data: Any) -> None:
    patches = [(t, h * merge, w * merge) for t, h, w in grids]
    ids = [TEXT] * data.draw(st.integers(1, 4))
    for t, h, w in grids:
        ids += [IMAGE] * (t * h * w) + [TEXT] * data.draw(st.integers(0, 3))
    sizes = Settings("", "", "", "", IMAGE, "", merge, (), 0, 0, 0)
    got, delta = pipeline.position_ids(np.array([ids]), np.array(patches, np.int64).reshape(-1, 3), sizes)
    want = placed(ids, patches, merge)
    assert got[:, 0].T.tolist() == [list(position) for position in want]
    # Generated tokens continue after the largest position.
    assert len(ids) + delta == max(max(position) for position in want) + 1


@SOME
@given(st.integers(1, 90), st.integers(1, 90), VISION, st.integers(0, 2**32 - 1))
def test_pixel_values_equal_the_formula(height: int, width: int, vision: ImageSettings, seed: int) -> None:
    assume(vision.min_pixels < 3000)
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))
    rows, grids = pipeline.preprocess([image], vision)
    size = pipeline.target_size(height, width, vision)
    pixels = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC))
    patch, merge, frames = vision.patch_size, vision.merge_size, vision.temporal_patch_size
    assert grids.tolist() == [[1, size[0] // patch, size[1] // patch]]
    assert rows.shape == (grids.prod(), 3 * frames * patch**2)
    rng = np.random.default_rng(seed)
    for _ in range(50):
        y, x, channel, frame = rng.integers(0, (size[0], size[1], 3, frames))
        block = (y // (patch * merge)) * (size[1] // (patch * merge)) + x // (patch * merge)
        row = block * merge**2 + (y // patch % merge) * merge + x // patch % merge
        column = ((channel * frames + frame) * patch + y % patch) * patch + x % patch
        value = (pixels[y, x, channel] / 255 - vision.mean[channel]) / vision.std[channel]
        assert rows[row, column] == pytest.approx(value, abs=1e-6)


@cache
def bundle() -> tuple[Settings, ImageSettings, Any]:
    """The settings and the tokenizer in a bundle of the miniature."""
    from tempfile import TemporaryDirectory

    checkpoint = open_checkpoint(MINIATURE)
    with TemporaryDirectory() as folder:
        texts = {"p.json": pipeline_settings(checkpoint, 4096), "v.json": vision_processor(checkpoint)}
        for name, text in texts.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        read = pipeline.read_settings(Path(folder) / "p.json"), pipeline.read_image_settings(Path(folder) / "v.json")
    return (*read, pipeline.load_tokenizer(MINIATURE / "tokenizer.json"))


TEXTS = st.text(st.characters(codec="utf-8"), max_size=60)


@SOME
@given(GRIDS, TEXTS)
@example([], "\u202e\x00 \r\n\t ½ \U0001f468\u200d\U0001f469\u200d\U0001f467 é e\u0301 \ufeff")
def test_images_have_one_token_per_feature(grids: list[tuple[int, int, int]], text: str) -> None:
    sizes, _, tokenizer = bundle()
    merge = sizes.spatial_merge_size
    assume(sizes.image_token not in text and sizes.video_token not in text)
    patches = np.array([(t, h * merge, w * merge) for t, h, w in grids], np.int64).reshape(-1, 3)
    ids = pipeline.encode(text, patches, tokenizer, sizes)
    assert (ids == sizes.image_token_id).sum() == sum(t * h * w for t, h, w in grids)
    positions, _ = pipeline.position_ids(ids, patches, sizes)
    assert positions.shape == (3, 1, ids.shape[1])


@pytest.mark.torch
@settings(MANY, max_examples=1000)
@given(SIDE, SIDE, VISION)
def test_sizes_equal_upstreams(height: int, width: int, vision: ImageSettings) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    unit = vision.patch_size * vision.merge_size
    try:
        want = smart_resize(height, width, unit, vision.min_pixels, vision.max_pixels)
    except ValueError:
        with pytest.raises(ImageError):
            pipeline.target_size(height, width, vision)
        return
    assert pipeline.target_size(height, width, vision) == want


MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16")
FORMATS = {"PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), "JPEG": ("RGB", "L", "CMYK"), "WEBP": ("RGB", "RGBA")}


@cache
def upstream() -> Any:
    from builder.reference.model import Reference

    return Reference(open_checkpoint(MINIATURE))


@pytest.mark.torch
@SOME
@given(st.data(), TEXTS)
def test_prompts_and_images_equal_upstreams(tmp_path_factory: pytest.TempPathFactory, data: Any, text: str) -> None:
    """Bit-identical token ids, pixel values and positions from files of any format, mode, size and orientation."""
    sizes, vision, tokenizer = bundle()
    assume(sizes.image_token not in text and sizes.video_token not in text)
    folder, files = tmp_path_factory.mktemp("images"), []
    for number in range(data.draw(st.integers(0, 3))):
        kind = data.draw(st.sampled_from(sorted(FORMATS)))
        mode = data.draw(st.sampled_from(FORMATS[kind]))
        width, height = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 200))
        seed = data.draw(st.integers(0, 99))
        noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        image = Image.fromarray(noise).convert("I" if mode == "I;16" else mode)
        exif = Image.Exif()
        exif[0x0112] = data.draw(st.integers(1, 8))
        files.append(folder / f"{number}.{kind.lower()}")
        (image.convert("I;16") if mode == "I;16" else image).save(files[-1], kind, exif=exif)
    want = upstream().prepare(text, files)
    got = pipeline.prepare(text, files, tokenizer, sizes, vision)
    np.testing.assert_array_equal(got.input_ids, want.input_ids)
    np.testing.assert_array_equal(got.position_ids, want.position_ids)
    if files:
        assert got.pixel_values is not None
        np.testing.assert_array_equal(got.pixel_values, want.pixel_values)
        np.testing.assert_array_equal(got.image_grid_thw, want.image_grid_thw)
