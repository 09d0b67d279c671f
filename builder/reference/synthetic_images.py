"""Pictures that are drawn for a checkpoint, in units of its patches.

In: a `Picture` of a cases file, the checkpoint's sizes. Out: a PNG. Guaranteed: the same pixels for the same picture
and sizes; one that is given in patches needs no resize.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from builder.checkpoint.load import Checkpoint
from builder.reference.case_file import Drawn, Picture, Written
from builder.util.errors import CasesError


@dataclass(frozen=True)
class SizeLimits:
    """What a checkpoint says of pictures: pixels of a patch's side, patches of a merged square's side, fewest and most
    pixels of a picture."""

    patch: int
    merge: int
    least: int
    most: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> SizeLimits:
        size = checkpoint.preprocessor["size"]
        vision = checkpoint.vision
        return cls(vision.patch_size, vision.merge_size, size["shortest_edge"], size["longest_edge"])


def draw(drawn: Drawn, limits: SizeLimits, folder: Path, case: Written) -> Path:
    """The picture in `folder`, under a name that no other file of cases gives it.

    Raises:
        CasesError: more patches than the checkpoint takes, where `case` does not lift its limits.
    """
    width, height = drawn.picture.pixels or _sides(drawn.picture, limits)
    if drawn.picture.pixels is None and width * height > limits.most and case.entry.limits != "lifted":
        raise CasesError(
            f"{case.file}: case {case.name!r}: {drawn.name!r} is larger than the checkpoint takes without a resize",
            expected=f"at most {limits.most // limits.patch**2} patches",
            found=f"{width // limits.patch} × {height // limits.patch}",
            next='ask for fewer patches, or for `pixels`, or lift the limits (limits = "lifted")',
        )
    if drawn.picture.pixels is not None and max(width, height) > 200 * min(width, height):
        raise CasesError(
            f"{case.file}: case {case.name!r}: one side of {drawn.name!r} is more than 200 times the other",
            expected="at most 200 times, which is what the image processor takes",
            found=f"{width} × {height} pixels",
        )
    pixels = np.random.default_rng(drawn.picture.seed).integers(0, 256, (height, width, 3), np.uint8)
    path = folder / f"{case.file.stem}-{drawn.name}.png"
    Image.fromarray(pixels).save(path, compress_level=0)
    return path


def _sides(picture: Picture, limits: SizeLimits) -> tuple[int, int]:
    """Width and height in pixels, multiples of a merged square's side; the longer side makes up what is missing."""
    unit = limits.patch * limits.merge
    asked = limits.least / limits.patch**2 if picture.patches == "least" else int(picture.patches or 1)
    squares = math.ceil(asked / limits.merge**2)
    aspect = max(picture.aspect, 1 / picture.aspect)
    short = max(1, round(math.sqrt(squares / aspect)))
    long = max(math.ceil(squares / short), round(short * aspect))
    width, height = (long, short) if picture.aspect >= 1 else (short, long)
    return width * unit, height * unit
