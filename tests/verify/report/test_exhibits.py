"""Test what is recorded for the report's pages while a verification runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from builder.reference.cases import Suite, held_out, shipped_cases
from builder.verify.report.exhibits import (
    POINTS,
    POSITIONS,
    TEXT,
    Exhibit,
    collecting,
    show_answers,
    show_case,
    show_logits,
    show_pixels,
)
from builder.verify.report.thumbnails import SIDE, difference, patches_to_image, thumbnail
from tests.helpers.reports import GRID, VISION, drawn, image_of

if TYPE_CHECKING:
    from builder.reference.model import Reference


@pytest.fixture
def shown() -> Iterator[Callable[[], tuple[Exhibit, ...]]]:
    with collecting(VISION) as collected:
        yield collected


def test_nothing_is_recorded_outside_collecting() -> None:
    show_case("text", "Hello", [Path("there-is-no-such-file.png")])
    show_logits("text", (0, 1), np.zeros((1, 3)), np.zeros((1, 3)))
    show_pixels("ours", None, np.zeros((24, 96)), None, GRID)
    show_answers("a", "b")


def test_records_belong_to_their_case(shown: Callable[[], tuple[Exhibit, ...]]) -> None:
    show_answers("no case yet", "no case yet")
    show_case("one", "first", ())
    show_case("two", "second", (), kind="task", expected="b")
    show_answers("b", "a")
    show_case("one", "first", ())
    show_answers("x" * 1000, "y")
    show_logits("two", (0, 1), np.zeros((1, 9)), np.zeros((1, 9)))
    one, two = shown()
    assert (two.kind, two.expected, two.answers, len(two.divergences)) == ("task", "b", ("a", "b"), 1)
    assert (one.kind, one.expected, one.divergences) == ("case", None, ())
    assert (one.answers[0], len(one.answers[1])) == ("y", TEXT)


def test_logits_are_a_sample_with_the_largest_of_each_position(shown: Callable[[], tuple[Exhibit, ...]]) -> None:
    rng = np.random.default_rng(0)
    want = rng.standard_normal((1, 2000, 500)).astype(np.float32)
    got = want + np.float32(0.01)
    show_case("long", "prompt", ())
    for begin in (0, 1000):
        show_logits("long", (begin, begin + 1000), got[:, begin : begin + 1000], want[:, begin : begin + 1000])
    (exhibit,) = shown()
    assert len(exhibit.logits) <= POINTS
    assert len(exhibit.divergences) <= POSITIONS
    assert len(exhibit.logits) > POINTS / 2
    ours = np.array(exhibit.logits)
    np.testing.assert_allclose(ours[:, 1] - ours[:, 0], 0.01, atol=1e-6)
    assert want[0, 999].max() in ours[:, 0].astype(np.float32)

    before = shown()
    show_logits("long", (0, 1000), got[:, :1000], want[:, :1000])
    assert shown() == before, "the same span twice"


def test_values_that_are_not_finite_are_counted_and_not_plotted(shown: Callable[[], tuple[Exhibit, ...]]) -> None:
    want = np.random.default_rng(0).standard_normal((2, 40)).astype(np.float32)
    got = want.copy()
    got[1] = np.nan
    show_case("broken", "prompt", ())
    show_logits("broken", (0, 2), got, want)
    (exhibit,) = shown()
    assert (exhibit.undefined, len(exhibit.divergences)) == (1, 1)
    assert all(math.isfinite(value) for pair in exhibit.logits for value in pair)


def patches_of(image: np.ndarray) -> np.ndarray:
    """Split an image [height, width, channels] into patches in the order of transformers' processor, block by block."""
    side, merge = VISION.patch_size, VISION.merge_size
    rows, columns = image.shape[0] // side, image.shape[1] // side
    patches = []
    for block_row in range(0, rows, merge):
        for block_column in range(0, columns, merge):
            for row in range(block_row, block_row + merge):
                for column in range(block_column, block_column + merge):
                    patch = image[row * side : (row + 1) * side, column * side : (column + 1) * side]
                    patches.append(np.stack([patch.transpose(2, 0, 1)] * VISION.temporal_patch_size, 1).reshape(-1))
    return np.stack(patches)


def test_patches_come_back_to_their_places() -> None:
    image = np.random.default_rng(1).random((16, 24, 3), np.float32)
    np.testing.assert_array_equal(patches_to_image(patches_of(image), GRID[0], VISION), image)


@pytest.mark.torch
def test_patches_are_in_the_order_of_the_transformers_processor(reference: Reference, tmp_path: Path) -> None:
    """The output of the real processor reassembles into a smooth image."""
    case = next(case for case in shipped_cases() if case.name == "own size" or len(case.images) == 1)
    prompt = reference.prepare(case.prompt, case.images)
    assert prompt.pixel_values is not None
    assert prompt.image_grid_thw is not None
    vision = reference.checkpoint.vision
    image = patches_to_image(prompt.pixel_values, prompt.image_grid_thw[0], vision)
    rows, columns = (int(n) * vision.patch_size for n in prompt.image_grid_thw[0][1:])
    assert image.shape == (rows, columns, 3)
    steps = np.abs(np.diff(image, axis=1)).mean((0, 2))
    seams = np.zeros(columns - 1, bool)
    seams[vision.patch_size - 1 :: vision.patch_size] = True
    # Misplaced patches would make the seams rougher than the inside of a patch.
    assert steps[seams].mean() < 1.5 * steps[~seams].mean()


def test_a_single_differing_pixel_is_visible() -> None:
    gap = np.zeros((1000, 700, 3))
    gap[10, 20] = 5.0
    gap[999, 699, 1] = 1e-6
    seen = image_of(difference(gap)).sum(-1)
    assert max(seen.shape) <= SIDE
    assert (seen > 40).sum() == 2
    assert seen[-1, -1] > 40
    assert seen.max() > 600
    assert not image_of(difference(np.zeros((8, 8, 3)))).any()


def test_pixels_are_compared_image_by_image(shown: Callable[[], tuple[Exhibit, ...]], tmp_path: Path) -> None:
    grid = np.concatenate([GRID, GRID])
    want = np.random.default_rng(2).random((48, 96)).astype(np.float32)
    got = want.copy()
    got[30, :4] += 0.25
    images = [drawn(tmp_path / f"{n}.png", (24, 16)) for n in range(2)]
    show_case("two", "prompt", images)
    show_pixels("ours", got, want, grid, grid)
    rotated = grid[:, [0, 2, 1]]
    show_pixels("rotated", want, want, rotated, grid)
    show_pixels("fewer", want[:24], want, GRID, grid)
    show_pixels("none", None, want, None, grid)
    (exhibit,) = shown()
    first, second = exhibit.images
    assert [(pixels.way, pixels.differing, pixels.largest) for pixels in first.pixels] == [
        ("ours", 0, 0.0),
        *((way, 24 * 96, None) for way in ("rotated", "fewer", "none")),
    ]
    assert not first.pixels[0].difference
    ours, other, fewer, none = second.pixels
    assert (ours.values, ours.differing, ours.largest) == (24 * 96, 4, 0.25)
    assert ours.difference
    assert len(ours.sides) == 2
    assert not other.difference
    assert image_of(other.sides[0]).shape[:2] == (16, 24)
    assert image_of(other.sides[1]).shape[:2] == (24, 16)
    assert fewer.sides == none.sides == ()


def test_thumbnails_are_small_and_files_that_are_not_images_have_none(tmp_path: Path) -> None:
    found = image_of(thumbnail(drawn(tmp_path / "large.png", (3000, 1500))))
    assert found.shape == (SIDE // 2, SIDE, 3)
    assert np.abs(found - [200, 30, 30]).max() < 12
    (tmp_path / "text.png").write_text("not an image")
    assert thumbnail(tmp_path / "text.png") == thumbnail(tmp_path / "absent.png") == ""


@pytest.mark.torch
@pytest.mark.parametrize("target", ["genai", "onnxruntime"])
def test_a_verification_shows_its_cases(miniature_built: Path, reference: Reference, target: str) -> None:
    from builder.verify.whole import verify

    cases = tuple(case for case in shipped_cases() if case.name in ("text", "one image"))
    report = verify(miniature_built / target, target, reference, Suite(cases, held_out(reference.checkpoint)[:2], 4))
    shown = {exhibit.case: exhibit for exhibit in report.exhibits if exhibit.kind == "case"}
    assert set(shown) == {"text", "one image"}
    assert sum(exhibit.kind == "task" for exhibit in report.exhibits) == 2
    for exhibit in report.exhibits:
        assert len(exhibit.answers) == 2
        assert exhibit.answers[0] == exhibit.answers[1]
    (image,) = shown["one image"].images
    ways = {"preprocessing of the bundle"} | ({"the runtime's own processor"} if target == "genai" else set())
    assert {pixels.way for pixels in image.pixels} == ways
    assert {pixels.differing for pixels in image.pixels} == {0}
    for exhibit in shown.values():
        assert exhibit.logits
        assert max(abs(a - b) for a, b in exhibit.logits) < 1e-3
        # The packed graph gives the last position of each call only.
        assert len(exhibit.divergences) >= (4 if target == "genai" else 12)
        assert 0 <= max(exhibit.divergences) < 1e-8
