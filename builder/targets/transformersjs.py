"""Target `transformersjs`: transformers.js ≥ 4.3 in Node.js and browsers, DeepStack packed into the hidden axis.

builder/targets/graphs.py explains what the library requires of the graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.checkpoint.load import Checkpoint
from builder.checkpoint.parts import DECODER, EMBEDDINGS, VISION
from builder.graph.ports import ROLES
from builder.targets.config_files import as_json, eos_token_ids, pipeline_settings, vision_processor
from builder.targets.image_preprocessor import image_preprocessor_graph
from builder.targets.runners.node import PINNED_LIBRARY
from builder.targets.spec import GraphFiles, Packaging

if TYPE_CHECKING:
    from builder.targets.recipe import Recipe, Target

NAME = "transformersjs"
STEMS = {VISION: "vision_encoder", EMBEDDINGS: "embed_tokens", DECODER: "decoder_model_merged"}
SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4", "q4f16": "_q4f16"}
DEMO = Path(__file__).parent / "clients" / "demo"
VERSION = "@TRANSFORMERS_JS@"  # in the demo's files: placeholder for the library's version
BICUBIC = 3  # `resample` is PIL's number of the filter


def dtype(recipe: Recipe) -> str:
    """Return the library's `dtype` of a bundle: it has one for all graphs, here that of the fewest bits."""
    stores = {rule.store for rule in recipe.rules} - {"keep"}
    if "int4" in stores:
        return "q4" if recipe.precision == "fp32" else "q4f16"
    return "q8" if stores else recipe.precision


def layout(graph: str, recipe: Recipe) -> GraphFiles:
    """Return the paths where the library looks for a graph and its data."""
    path = f"onnx/{STEMS.get(graph, graph)}{SUFFIXES[dtype(recipe)] if graph in STEMS else ''}.onnx"
    return GraphFiles(path, f"{path}_data")


def _configs(checkpoint: Checkpoint, recipe: Recipe, target: Target) -> Mapping[str, str]:
    return {
        "config.json": as_json(config(checkpoint, recipe)),
        "preprocessor_config.json": as_json(preprocessor_config(checkpoint)),
        "generation_config.json": as_json({**checkpoint.generation, "eos_token_id": eos_token_ids(checkpoint)}),
        "vision_processor.json": vision_processor(checkpoint),
        "pipeline.json": pipeline_settings(checkpoint, recipe.max_length),
        **_programs(),
    }


def _programs() -> Mapping[str, str]:
    """Return the files of the demo page."""
    return {
        f"demo/{file.name}": file.read_text(encoding="utf-8").replace(VERSION, PINNED_LIBRARY)
        for file in sorted(DEMO.iterdir())
    }


def config(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    """Return config.json: the checkpoint's, with derived values written out and the library's own section.

    Without `dtype`, a browser would look for 8-bit files; it loads only as many data files as
    `use_external_data_format` gives for a graph.
    """
    text, vision, source = checkpoint.text, checkpoint.vision, checkpoint.config
    derived = {
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "head_dim": text.head_dim,
    }
    stems = [STEMS[role] for role in ROLES]
    return {
        **source,
        "image_token_id": checkpoint.image_token_id,
        "video_token_id": checkpoint.video_token_id,
        "vision_start_token_id": checkpoint.vision_start_token_id,
        "text_config": {**source["text_config"], **derived},
        "vision_config": {**source["vision_config"], "spatial_merge_size": vision.merge_size},
        "transformers.js_config": {
            "dtype": dtype(recipe),
            "use_external_data_format": dict.fromkeys(stems, 1),
        },
    }


def preprocessor_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return preprocessor_config.json: the checkpoint's, plus transformers' defaults that the library lacks."""
    vision = checkpoint.vision
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "rescale_factor": 1 / 255,
        **{key: value for key, value in checkpoint.preprocessor.items() if value is not None},
        "resample": BICUBIC,
        "patch_size": vision.patch_size,
        "merge_size": vision.merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessor",
    }


PACKAGING = Packaging(
    configs=_configs,
    programs=_programs,
    layout=layout,
    further=image_preprocessor_graph,
)
