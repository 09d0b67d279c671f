"""Generate the synthetic images of a cases file for a checkpoint, in units of its patches.

The same image and sizes give the same pixels; an image given in patches needs no resize.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from builder.checkpoint.load import Checkpoint
from builder.reference.case_file import FileCase, NamedImage, SyntheticImage
from builder.util.errors import CasesError


@dataclass(frozen=True)
class SizeLimits:
    """Image sizes of a checkpoint.

    Args:
        patch: side of a patch, in pixels.
        merge: side of a merged square, in patches.
        least: fewest pixels of an image.
        most: most pixels of an image.
    """

    patch: int
    merge: int
    least: int
    most: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> SizeLimits:
        size = checkpoint.preprocessor["size"]
        vision = checkpoint.vision
        return cls(vision.patch_size, vision.merge_size, size["shortest_edge"], size["longest_edge"])


def draw(image: NamedImage, limits: SizeLimits, folder: Path, case: FileCase) -> Path:
    """Write the image to `folder` and return its path, which includes the name of the cases file.

    Raises:
        CasesError: the image has more patches than the checkpoint accepts, and `case` does not lift its limits.
    """
    width, height = image.spec.pixels or _sides(image.spec, limits)
    if image.spec.pixels is None and width * height > limits.most and case.entry.limits != "lifted":
        raise CasesError(
            f"{case.file}: case {case.name!r}: {image.name!r} is larger than the checkpoint accepts without a resize",
            expected=f"at most {limits.most // limits.patch**2} patches",
            found=f"{width // limits.patch} × {height // limits.patch}",
            next='use fewer patches, or `pixels`, or lift the limits (limits = "lifted")',
        )
    if image.spec.pixels is not None and max(width, height) > 200 * min(width, height):
        raise CasesError(
            f"{case.file}: case {case.name!r}: one side of {image.name!r} is more than 200 times the other",
            expected="at most 200 times, the limit of the image processor",
            found=f"{width} × {height} pixels",
        )
    pixels = np.random.default_rng(image.spec.seed).integers(0, 256, (height, width, 3), np.uint8)
    path = folder / f"{case.file.stem}-{image.name}.png"
    Image.fromarray(pixels).save(path, compress_level=0)
    return path


def _sides(image: SyntheticImage, limits: SizeLimits) -> tuple[int, int]:
    """Return width and height in pixels, multiples of a merged square's side; the longer side is rounded up."""
    unit = limits.patch * limits.merge
    patches = limits.least / limits.patch**2 if image.patches == "least" else int(image.patches or 1)
    squares = math.ceil(patches / limits.merge**2)
    aspect = max(image.aspect, 1 / image.aspect)
    short = max(1, round(math.sqrt(squares / aspect)))
    long = max(math.ceil(squares / short), round(short * aspect))
    width, height = (long, short) if image.aspect >= 1 else (short, long)
    return width * unit, height * unit
