"""Check the image settings of a checkpoint, and convert those of older releases.

Guarantees: `patch_size`, `temporal_patch_size` and `merge_size` match the vision config, `image_mean` and `image_std`
have one number per channel, and `size` has `shortest_edge` and `longest_edge` (pixel counts; `min_pixels` and
`max_pixels` in older files).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builder.checkpoint.config import Vision
from builder.util.errors import CheckpointError, UnsupportedError

PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
# Every image is resized to at least `shortest_edge` pixels, which must fit in memory.
MOST_LEAST, MOST_PIXELS, MOST_LEVEL = 2**26, 2**31 - 1, 1e6
# Steps of upstream's processor with the only supported setting of each; 3 is bicubic.
STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3}


def read_preprocessor(raw: Mapping[str, Any], file: str, vision: Vision) -> dict[str, Any]:
    """Return the checked settings in `raw`, the content of `file`.

    Raises:
        UnsupportedError: another image processor, or an unsupported setting of a step.
        CheckpointError: a setting is missing, or contradicts the vision config.
    """
    settings = dict(raw)
    kind = settings.get("image_processor_type", PROCESSORS[0])
    if kind not in PROCESSORS:
        raise UnsupportedError(f"{file}: {kind} cannot be exported", expected=", ".join(PROCESSORS), found=kind)
    for step, setting in STEPS.items():
        if settings.get(step, setting) != setting:
            raise UnsupportedError(f"{file}: {step} cannot be changed", expected=setting, found=settings[step])
    factor = settings.get("rescale_factor", 1 / 255)
    if type(factor) is not float or abs(factor - 1 / 255) > 1e-9:
        raise UnsupportedError(f"{file}: rescale_factor cannot be changed", expected="1/255", found=factor)
    sizes = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.merge_size,
    }
    for key, expected in sizes.items():
        if settings.get(key) != expected:
            raise CheckpointError(
                f"{file}: {key} contradicts the vision_config of config.json",
                expected=expected,
                found=settings.get(key),
            )
    for key in ("image_mean", "image_std"):
        _check_channels(file, key, settings.get(key), vision.in_channels)
    settings["size"] = _pixel_counts(settings, file)
    return settings


def _check_channels(file: str, key: str, value: Any, channels: int) -> None:
    numbers = isinstance(value, list) and all(
        type(number) in (int, float) and -MOST_LEVEL <= number <= MOST_LEVEL for number in value
    )
    if not numbers or len(value) != channels or (key == "image_std" and 0 in value):
        raise CheckpointError(f"{file}: {key} is not a list of {channels} numbers, one per channel", found=value)


def _pixel_counts(settings: dict[str, Any], file: str) -> dict[str, int]:
    """Read `size`; `min_pixels` and `max_pixels` take precedence, as in upstream's `Qwen2VLImageProcessorPil`."""
    size = settings.get("size")
    counts = dict(size) if isinstance(size, dict) else {}
    for key, older in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        count = settings.pop(older, None)
        counts[key] = counts.get(key) if count is None else count
    low, high = counts["shortest_edge"], counts["longest_edge"]
    if type(low) is not int or type(high) is not int or not 0 < low <= high <= MOST_PIXELS or low > MOST_LEAST:
        raise CheckpointError(
            f"{file}: size does not give the least and most pixels of an image",
            expected='"size": {"shortest_edge": 65536, "longest_edge": 16777216}, for example',
            found=size,
        )
    return counts
