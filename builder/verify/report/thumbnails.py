"""Small images as `data:` URIs for a self-contained page.

Guarantees: no side is longer than `SIDE`; a single differing pixel stays visible in a difference image.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from builder.checkpoint.config import Vision

Array = npt.NDArray[Any]
SIDE = 128  # pixels
# Black, violet, orange, white: lightness increases throughout, so that the ramp is readable without color.
_RAMP = ((0.0, (0, 0, 0)), (0.35, (120, 28, 109)), (0.7, (237, 105, 37)), (1.0, (252, 255, 220)))


def thumbnail(path: Path) -> str:
    """Return a small copy of the image at `path`, rotated by its EXIF orientation; "" if it cannot be opened."""
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    image.thumbnail((SIDE, SIDE))
    white = Image.new("RGBA", image.size, "white")
    return _smallest(Image.alpha_composite(white, image).convert("RGB"))


def patches_to_image(patches: Array, size: Array, vision: Vision) -> Array:
    """Reassemble an image from its patches.

    Args:
        patches: [patches, channels·temporal·patch²], in the order of transformers' Qwen2-VL image processor: blocks of
            merge × merge patches, row by row.
        size: (frames, rows, columns) in patches.

    Returns:
        [height, width, channels]: the first frame.
    """
    frames, rows, columns = map(int, size)
    merge, side = vision.merge_size, vision.patch_size
    shape = (frames, rows // merge, columns // merge, merge, merge)
    blocks = patches.reshape(*shape, vision.in_channels, vision.temporal_patch_size, side, side)
    first = blocks[0, :, :, :, :, :, 0]  # (rows/merge, columns/merge, merge, merge, channels, patch, patch)
    placed: Array = first.transpose(0, 2, 5, 1, 3, 6, 4)
    return placed.reshape(rows * side, columns * side, vision.in_channels)


def scaled(image: Array, low: float, high: float) -> str:
    """Render an image [height, width, channels] with `low` as black and `high` as white."""
    span = (high - low) or 1.0
    bytes_ = np.clip(np.nan_to_num((image - low) / span) * 255, 0, 255).astype(np.uint8)
    small = Image.fromarray(np.ascontiguousarray(bytes_[..., :3]) if bytes_.shape[-1] >= 3 else bytes_[..., 0])
    small.thumbnail((SIDE, SIDE))
    return _smallest(small.convert("RGB"))


def difference(gap: Array) -> str:
    """Render absolute differences [height, width, channels], black where equal, max-pooled to at most `SIDE`."""
    flat = np.nan_to_num(gap.max(-1), nan=np.inf, posinf=np.inf)
    finite = flat[np.isfinite(flat)]
    flat = np.minimum(flat, finite.max(initial=0.0) or 1.0)
    step = max(1, -(-max(flat.shape) // SIDE))
    height, width = (-(-length // step) * step for length in flat.shape)
    padded = np.zeros((height, width))
    padded[: flat.shape[0], : flat.shape[1]] = flat
    pooled = padded.reshape(height // step, step, width // step, step).max((1, 3))
    # Starts at a quarter of the ramp, so that a small difference next to a large one is not black.
    level = np.where(pooled > 0, 0.25 + 0.75 * pooled / (pooled.max() or 1.0), 0.0)
    stops = [stop for stop, _ in _RAMP]
    channels = [np.interp(level, stops, [colour[c] for _, colour in _RAMP]) for c in range(3)]
    return _smallest(Image.fromarray(np.stack(channels, -1).astype(np.uint8)))


def _smallest(image: Image.Image) -> str:
    """Encode as PNG or JPEG, whichever is smaller."""
    encoded = []
    for kind, settings in (("png", {"optimize": True}), ("jpeg", {"quality": 82})):
        buffer = io.BytesIO()
        saved = image.quantize(64) if kind == "png" else image
        saved.save(buffer, kind, **settings)
        encoded.append((buffer.tell(), kind, buffer.getvalue()))
    _, kind, content = min(encoded)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
