"""Configuration files of every bundle: image settings and prompt format, derived from the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from builder.checkpoint.chat_template import split_template, token_text
from builder.checkpoint.load import Checkpoint
from builder.util.errors import CheckpointError


def as_json(value: Any) -> str:
    """Format a value as indented JSON with a final newline; keys keep their order."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def vision_processor(checkpoint: Checkpoint) -> str:
    """Return vision_processor.json, in the format of onnxruntime-extensions, which onnxruntime-genai runs.

    It is the only file of a bundle with image settings: builder/targets/clients/pipeline.py reads it too.
    """
    settings, vision = checkpoint.preprocessor, checkpoint.vision
    sizes = {"patch_size": vision.patch_size, "merge_size": vision.merge_size}
    unit = vision.patch_size * vision.merge_size
    bounds = {"min_pixels": settings["size"]["shortest_edge"], "max_pixels": settings["size"]["longest_edge"]}
    factor, channels = float(settings.get("rescale_factor", 1 / 255)), vision.in_channels
    mean, std = ([float(x) for x in settings[key]] for key in ("image_mean", "image_std"))
    steps: list[tuple[str, str, Mapping[str, Any]]] = [
        ("decode_image", "DecodeImage", {"color_space": "RGB"}),
        ("convert_to_rgb", "ConvertRGB", {}),
        # the format requires width and height; smart_resize ignores them
        (
            "resize",
            "Resize",
            {"interpolation": "CUBIC", "smart_resize": 1, "width": unit, "height": unit, **bounds, **sizes},
        ),
        # The runtime's Rescale multiplies in float32, which differs from upstream by one ulp for 111 of 256 byte
        # values; its Normalize divides, which equals upstream for all of them.
        ("to_float", "Rescale", {"rescale_factor": 1.0}),
        ("rescale", "Normalize", {"mean": [0.0] * channels, "std": [round(1 / factor, 6)] * channels}),
        # qwen3_vl swaps the channels, which the runtime's decoder returns in reverse order
        ("normalize", "Normalize", {"mean": mean, "std": std, "qwen3_vl": 1}),
        ("patch_image", "PatchImage", {**sizes, "temporal_patch_size": vision.temporal_patch_size}),
    ]
    transforms = [
        {"operation": {"name": name, "type": kind, **({"attrs": dict(attrs)} if attrs else {})}}
        for name, kind, attrs in steps
    ]
    return as_json({"processor": {"name": "qwen3_vl_image_processor", "transforms": transforms}})


def eos_token_ids(checkpoint: Checkpoint) -> list[int]:
    """Return the stop tokens from generation_config.json, or else from config.json.

    Raises:
        CheckpointError: neither file has any.
    """
    ids = _ids(checkpoint.generation.get("eos_token_id")) or _ids(text_config(checkpoint).get("eos_token_id"))
    if not ids:
        raise CheckpointError(
            f"{checkpoint.folder} does not define a stop token",
            expected="eos_token_id in generation_config.json, or in the text_config of config.json",
            found="neither",
        )
    return ids


def text_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return `text_config` from config.json."""
    config: Mapping[str, Any] = checkpoint.config["text_config"]
    return config


def _ids(value: Any) -> list[int]:
    return [] if value is None else [int(x) for x in value] if isinstance(value, list) else [int(value)]


def pipeline_settings(checkpoint: Checkpoint, max_length: int) -> str:
    """Return pipeline.json: what builder/targets/clients/pipeline.py and ports of it need besides the graphs."""
    return as_json(
        {
            "prompt": split_template(checkpoint),
            "image_token": token_text(checkpoint, checkpoint.image_token_id),
            "image_token_id": checkpoint.image_token_id,
            "video_token": token_text(checkpoint, checkpoint.video_token_id),
            "spatial_merge_size": checkpoint.vision.merge_size,
            "eos_token_ids": eos_token_ids(checkpoint),
            "max_length": min(max_length, checkpoint.text.max_position),
            "deepstack": len(checkpoint.vision.deepstack),
            "hidden": checkpoint.text.hidden,
        }
    )
