"""The configuration that every runtime reads: image settings and prompt format, derived from the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from builder.checkpoint.chat_template import split_template, token_text
from builder.checkpoint.load import Checkpoint
from builder.util.errors import CheckpointError


def as_json(value: Any) -> str:
    """Indented, keys in the order given, a newline at the end."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def vision_processor(checkpoint: Checkpoint) -> str:
    """vision_processor.json in onnxruntime-extensions' format, which onnxruntime-genai runs itself.

    The one place of a bundle for image settings: builder/targets/clients/pipeline.py reads this file as well.
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
        # width and height are required by the format and unread where smart_resize is on
        (
            "resize",
            "Resize",
            {"interpolation": "CUBIC", "smart_resize": 1, "width": unit, "height": unit, **bounds, **sizes},
        ),
        # The runtime's Rescale multiplies in float32, which is one unit in the last place off upstream for 111 of 256
        # levels; its Normalize divides, which gives upstream's value for each.
        ("to_float", "Rescale", {"rescale_factor": 1.0}),
        ("rescale", "Normalize", {"mean": [0.0] * channels, "std": [round(1 / factor, 6)] * channels}),
        # qwen3_vl swaps the channels, which the runtime's decoder hands over in the other order
        ("normalize", "Normalize", {"mean": mean, "std": std, "qwen3_vl": 1}),
        ("patch_image", "PatchImage", {**sizes, "temporal_patch_size": vision.temporal_patch_size}),
    ]
    transforms = [
        {"operation": {"name": name, "type": kind, **({"attrs": dict(attrs)} if attrs else {})}}
        for name, kind, attrs in steps
    ]
    return as_json({"processor": {"name": "qwen3_vl_image_processor", "transforms": transforms}})


def eos_token_ids(checkpoint: Checkpoint) -> list[int]:
    """Tokens that end an answer: generation_config.json's, else config.json's.

    Raises:
        CheckpointError: neither names one.
    """
    ids = _ids(checkpoint.generation.get("eos_token_id")) or _ids(text_config(checkpoint).get("eos_token_id"))
    if not ids:
        raise CheckpointError(
            f"no token of {checkpoint.folder} ends an answer",
            expected="eos_token_id in generation_config.json, or in the text_config of config.json",
            found="neither",
        )
    return ids


def text_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """config.json's text_config."""
    config: Mapping[str, Any] = checkpoint.config["text_config"]
    return config


def _ids(value: Any) -> list[int]:
    return [] if value is None else [int(x) for x in value] if isinstance(value, list) else [int(value)]


def pipeline_settings(checkpoint: Checkpoint, max_length: int) -> str:
    """pipeline.json: what builder/targets/clients/pipeline.py (and any port of it) must know besides the graphs."""
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
