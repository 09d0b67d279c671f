"""Test cases as data: valid files, refused files, and that exactly their checks are compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from builder.checkpoint.load import open_checkpoint
from builder.cli.app import app
from builder.reference.case_file import CHECKS, Tag, read_file
from builder.reference.cases import (
    IMAGES,
    SUITE,
    Case,
    Suite,
    layerwise,
    placed,
    read_cases,
    shipped_cases,
    whole_suite,
)
from builder.reference.synthetic_images import SizeLimits
from builder.targets.clients.pipeline import ImageSettings, target_size
from builder.util.errors import CasesError
from builder.verify import whole
from builder.verify.golden.record import case_digest
from builder.verify.tolerances import FP32
from tests.helpers.checkpoints import MINIATURE
from tests.helpers.shown import shown

if TYPE_CHECKING:
    from builder.reference.model import Reference

MINI = SizeLimits(16, 2, 4096, 131072)
REAL = SizeLimits(16, 2, 65536, 16777216)
ODD = SizeLimits(14, 3, 4096, 131072)
CASE = '[[case]]\nname = "mine"\nprompt = "What?"\n'


def written(folder: Path, text: str, name: str = "mine.toml") -> Path:
    (folder / "in").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (200, 10, 10)).save(folder / "in" / "red.png")
    Image.new("RGB", (40, 30)).save(folder / "outside.png")
    path = folder / "in" / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shipped_cases_cover_the_difficult_inputs() -> None:
    cases = {case.name: case for case in read_cases((SUITE,))}
    formats = {path.suffix for case in cases.values() for path in case.images if isinstance(path, Path)}
    assert formats == {".png", ".jpg"}
    assert {len(case.images) for case in cases.values()} >= {0, 1, 2, 3}
    assert {"text", "unusual unicode", "long prompt", "JPEG 4:2:0", "greyscale", "RGBA", "EXIF-rotated"} <= set(cases)
    used = {path for case in cases.values() for path in case.images if isinstance(path, Path)}
    assert used == {path.resolve() for path in IMAGES.iterdir() if path.suffix != ".md"}


def test_tags_select_shipped_cases(tmp_path: Path) -> None:
    chosen = {tag: [case.name for case in shipped_cases() if tag in case.tags] for tag in get_args(Tag)}
    assert chosen == {
        "layerwise": ["one image", "wide, tall", "text"],
        "ranges": ["one image", "wide, tall", "three images", "text", "long prompt"],
        "self-test": ["one image", "wide, tall"],
    }
    mine, tagged = (
        placed(read_file(written(tmp_path, CASE + tags)), MINI, tmp_path)[0] for tags in ("", 'tags = ["self-test"]')
    )
    assert [case.name for case in layerwise((*shipped_cases(), mine))] == [*chosen["layerwise"], "mine"]
    assert layerwise([tagged]) == (tagged,)
    assert case_digest(tagged) == case_digest(mine)


@pytest.mark.parametrize("limits", [MINI, REAL, ODD], ids=["miniature", "real", "patch14merge3"])
def test_synthetic_images_fit_every_checkpoint(limits: SizeLimits, tmp_path: Path) -> None:
    cases = {case.name: case for case in placed(read_cases((SUITE,)), limits, tmp_path)}

    def resized(case: str, number: int) -> tuple[tuple[int, int], tuple[int, int]]:
        with Image.open(cases[case].images[number]) as image:
            settings = ImageSettings(limits.least, limits.most, limits.patch, 2, limits.merge, 255.0, (0.5,), (0.5,))
            height, width = target_size(image.height, image.width, settings)
            return image.size, (width, height)

    for case, number in (("own size", 0), ("extreme aspect ratios", 0)):
        size, target = resized(case, number)
        assert size == target
    assert resized("extreme aspect ratios", 0)[0][0] >= 40 * limits.patch * limits.merge
    assert resized("one pixel", 0)[0] == (1, 1)
    with Image.open(cases["more than 10,000 patches"].images[0]) as image:
        assert image.width * image.height > 10_000 * limits.patch**2
        assert image.width % (limits.patch * limits.merge) == image.height % (limits.patch * limits.merge) == 0


def test_synthetic_images_are_reproducible(tmp_path: Path) -> None:
    pixels = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (case,) = [case for case in placed(read_cases((SUITE,)), MINI, tmp_path / name) if case.name == "own size"]
        pixels.append(np.asarray(Image.open(case.images[0])))
        assert case.drawn == (True,)
    np.testing.assert_array_equal(pixels[0], pixels[1])
    assert pixels[0].std() > 50


def test_a_user_file_is_read(tmp_path: Path) -> None:
    text = (
        CASE
        + 'images = ["red.png", "small"]\nchecks = ["features", "inputs"]\nmax_new_tokens = 5\n'
        + '[picture.small]\ndraw = "noise"\npatches = 40\nseed = 7\n'
    )
    (case,) = placed(read_file(written(tmp_path, text)), MINI, tmp_path)
    assert (case.name, case.prompt, case.checks, case.max_new_tokens) == ("mine", "What?", ("inputs", "features"), 5)
    assert case.drawn == (False, True)
    assert case.unchecked == ("embeddings", "decoder", "tokens", "runtime")
    assert Image.open(case.images[1]).size == (4 * 32, 3 * 32)
    checkpoint = open_checkpoint(MINIATURE)
    suite = whole_suite(checkpoint, tmp_path, [tmp_path / "in"])
    assert suite.cases[-1] == case
    assert len(suite.cases) == len(read_cases((SUITE,))) + 1


def test_a_text_leaves_nothing_unchecked() -> None:
    assert Case("text", "What?").unchecked == ()
    assert Case("text", "What?", checks=("inputs",)).unchecked == ("embeddings", "decoder", "tokens")


REFUSED = {
    "an unknown key": (CASE + "image = []\n", "unknown key `case.0.image`", "`images`"),
    "an unknown key of an image": (
        CASE + 'images = ["x"]\n[picture.x]\ndraw = "noise"\npatch = 4\n',
        "unknown key `picture.x.patch`",
        "`patches`",
    ),
    "an unknown table": ("[other]\nx = 1\n" + CASE, "unknown key `other`", ""),
    "no prompt": ('[[case]]\nname = "mine"\n', "`case.0.prompt` is missing", ""),
    "no case": ("", "`case` is missing", ""),
    "a wrong type": (CASE + 'max_new_tokens = "5"\n', "`case.0.max_new_tokens` is not valid", ""),
    "an unknown check": (CASE + 'checks = ["logits"]\n', "`case.0.checks.0` is not valid", ""),
    "an unknown tag": (CASE + 'tags = ["layer-wise"]\n', "`case.0.tags.0` is not valid", ""),
    "an unknown tolerance": (CASE + 'tolerance = "loose"\n', "`case.0.tolerance` is not valid", ""),
    "an image above": (CASE + 'images = ["../outside.png"]\n', "outside the folder", "copy"),
    "an image by its absolute path": (CASE + 'images = ["/etc/hostname"]\n', "outside the folder", "copy"),
    "an image by a link": (CASE + 'images = ["link.png"]\n', "outside the folder", "copy"),
    "no image": (CASE + 'images = ["blue.png"]\n', "image 'blue.png' does not exist", ""),
    "a folder": (CASE + 'images = ["."]\n', "image '.' does not exist", ""),
    "an unused image": (CASE + '[picture.x]\ndraw = "noise"\npatches = 4\n', "no case uses", "remove"),
    "an image of no size": (CASE + 'images = ["x"]\n[picture.x]\ndraw = "noise"\n', "either `patches` or `pixels`", ""),
    "an image of two sizes": (
        CASE + 'images = ["x"]\n[picture.x]\ndraw = "noise"\npatches = 4\npixels = [4, 4]\n',
        "either `patches` or `pixels`",
        "",
    ),
    "an image too large to draw": (
        CASE + 'images = ["x"]\n[picture.x]\ndraw = "noise"\npixels = [1, 1000000000]\n',
        "is not valid",
        "",
    ),
    "tokens without logits": (CASE + 'checks = ["tokens"]\n', "compares tokens", ""),
    "lifted limits with tokens": (CASE + 'limits = "lifted"\n', "lifts the checkpoint's limits", ""),
    "no TOML": ("[[case]\n", "cannot be read as cases", ""),
    "too large": ("#" * 2**20 + "\n" + CASE, "is too large", ""),
}


@pytest.mark.parametrize(("text", "what", "next_step"), REFUSED.values(), ids=REFUSED.keys())
def test_invalid_files_are_refused(tmp_path: Path, text: str, what: str, next_step: str) -> None:
    path = written(tmp_path, text)
    (path.parent / "link.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(CasesError) as caught:
        read_cases((path,))
    assert what in caught.value.what
    assert str(path) in caught.value.what
    assert next_step in str(caught.value.next)


@pytest.mark.parametrize(
    ("size", "what"), [("patches = 600", "larger than the checkpoint accepts"), ("pixels = [1, 201]", "more than 200")]
)
def test_images_that_a_checkpoint_cannot_take_are_refused(tmp_path: Path, size: str, what: str) -> None:
    path = written(tmp_path, CASE + f'images = ["x"]\n[picture.x]\ndraw = "noise"\n{size}\n')
    with pytest.raises(CasesError, match=what):
        placed(read_file(path), MINI, tmp_path)


def test_names_are_unique_and_folders_contain_cases(tmp_path: Path) -> None:
    path = written(tmp_path, CASE.replace("mine", "text"))
    with pytest.raises(CasesError, match="two cases have the name 'text'"):
        read_cases((SUITE, path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CasesError, match="contains no cases"):
        read_cases((tmp_path / "empty",))
    with pytest.raises(CasesError, match="cannot be read"):
        read_cases((tmp_path / "absent.toml",))


@pytest.mark.torch  # to build the bundle
def test_the_command_refuses_a_broken_file(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    path = written(tmp_path, CASE + "image = []\n")
    arguments = ["verify", str(bundle("genai")), "--reference", str(MINIATURE), "--cases", str(path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 25
    assert "unknown key `case.0.image`" in done.stderr


@pytest.mark.torch
def test_exactly_the_checks_of_a_case_are_compared(miniature_built: Path, reference: Reference) -> None:
    (image,) = [case.images for case in shipped_cases() if case.name == "one image"]
    cases = (
        Case("some", "What?", image, checks=("inputs", "features")),
        Case("few", "What?", checks=CHECKS, max_new_tokens=3, tolerance="tight"),
    )
    report = whole.verify(miniature_built / "genai", "genai", reference, Suite(cases))
    assert report.ok, shown(report)
    places = {gate.place for gate in report.gates if gate.case.startswith("some") and "layer" not in gate.place}
    assert places == {"token ids", "pixel values", "position ids", "image features", "deepstack features"}
    assert [gate.case for gate in report.gates if gate.place == "tokens"] == ["few, 3 tokens", "near ties"]
    limits = {(gate.case.split(",")[0], gate.limit) for gate in report.gates if gate.limit and "grid" not in gate.case}
    assert limits == {("some", FP32), ("few", FP32 / 5), ("batch of two", FP32), ("near ties", 1.0)}
    assert report.facts["not checked"] == {"some": ["embeddings", "decoder", "tokens", "runtime"]}
    assert "case some: not compared, as its file requests: embeddings, decoder, tokens, runtime" in shown(report)


@pytest.mark.torch
def test_lifted_limits_reach_pytorch(reference: Reference, tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    Image.new("RGB", (640, 320)).save(path)
    kept, lifted = (reference.prepare("What?", [path], lifted=lifted).image_grid_thw for lifted in (False, True))
    assert kept is not None
    assert lifted is not None
    assert lifted.tolist() == [[1, 20, 40]]
    assert kept.prod() <= 512
