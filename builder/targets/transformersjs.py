"""Target `transformersjs`: transformers.js ≥ 4.3 in Node.js and browsers, DeepStack packed into the hidden axis.

The library looks the tokens up, writes each image token's row of `image_features` over its embedding, and hands the
result to the decoder, whatever its width: so that (1 + D)·H goes through it. It copies those rows as they lie in
memory, which is why both are float32 in every precision; it makes the empty cache from the decoder's ports, of which it
knows the axis `batch_size` by name. A browser gives each graph the data file that bears its name and no other.
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
from builder.targets.runners.node import LIBRARY, PINNED_LIBRARY
from builder.targets.spec import GraphFiles, Notes, Packaging

if TYPE_CHECKING:
    from builder.targets.recipe import Recipe, Target

NAME = "transformersjs"
STEMS = {VISION: "vision_encoder", EMBEDDINGS: "embed_tokens", DECODER: "decoder_model_merged"}
SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4", "q4f16": "_q4f16"}
DEMO = Path(__file__).parent / "clients" / "demo"
VERSION = "@TRANSFORMERS_JS@"  # in the demo's files: of the library that it was made for
BICUBIC = 3  # as PIL counts its filters, and as the library reads `resample`


def dtype(recipe: Recipe) -> str:
    """The library's word for what a recipe stores, of which it has one a bundle: that of the fewest bits."""
    stores = {rule.store for rule in recipe.rules} - {"keep"}
    if "int4" in stores:
        return "q4" if recipe.precision == "fp32" else "q4f16"
    return "q8" if stores else recipe.precision


def layout(graph: str, recipe: Recipe) -> GraphFiles:
    """Where the library looks."""
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
    """The demo page."""
    return {
        f"demo/{file.name}": file.read_text(encoding="utf-8").replace(VERSION, PINNED_LIBRARY)
        for file in sorted(DEMO.iterdir())
    }


def config(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    """The checkpoint's config.json, what the library derives from it written out, and the library's own section.

    `dtype` is there because a browser would otherwise look for 8-bit files; a browser loads only the data files that
    `use_external_data_format` counts.
    """
    text, vision, given = checkpoint.text, checkpoint.vision, checkpoint.config
    own = {
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "head_dim": text.head_dim,
    }
    stems = [STEMS[role] for role in ROLES]
    return {
        **given,
        "image_token_id": checkpoint.image_token_id,
        "video_token_id": checkpoint.video_token_id,
        "vision_start_token_id": checkpoint.vision_start_token_id,
        "text_config": {**given["text_config"], **own},
        "vision_config": {**given["vision_config"], "spatial_merge_size": vision.merge_size},
        "transformers.js_config": {
            "dtype": dtype(recipe),
            "use_external_data_format": dict.fromkeys(stems, 1),
        },
    }


def preprocessor_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's, with every default of transformers that is not the library's written out."""
    vision, given = checkpoint.vision, checkpoint.preprocessor
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "rescale_factor": 1 / 255,
        **{key: value for key, value in given.items() if value is not None},
        "resample": BICUBIC,
        "patch_size": vision.patch_size,
        "merge_size": vision.merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessor",
    }


NOTES = Notes(
    "transformers.js",
    (),
    (f"ONNXRUNTIME_NODE_INSTALL=skip npm install {LIBRARY}@{PINNED_LIBRARY}",),
    (
        "The library's own processor is equal to transformers' for RGB PNGs that need no resize. Where it must resize, "
        "grid and pixels differ; `onnx/image_preprocessor.onnx` gives both as transformers does, for any size (see "
        "`demo/worker.mjs`; in browsers it needs the build of onnxruntime-web that has float64, as there).",
        "The library's own processor takes one picture a question: further ones become frames of one film.",
        "Without a picture the library (4.3.1) gives the tokens of an answer positions far behind the prompt; the "
        "decoder here puts them right, and takes no position beyond the number of tokens.",
        "Logits are the last position's only.",
        "On WebGPU it was run with a software adapter, in fp32 and int4; in fp16, or on a graphics processor, not.",
        "A browser holds each data file in memory, in one piece: weights beyond 2 GB a file do not load there.",
        "`demo/` is code: look at it before you serve a copy that somebody gave you.",
    ),
    """\
import { AutoProcessor, Qwen3VLForConditionalGeneration, RawImage, TextStreamer, env } from "@huggingface/transformers";

env.allowRemoteModels = false;
const folder = process.cwd();
const processor = await AutoProcessor.from_pretrained(folder);
const model = await Qwen3VLForConditionalGeneration.from_pretrained(folder);
const question = [{ type: "image" }, { type: "text", text: "What is this?" }];
const prompt = processor.apply_chat_template([{ role: "user", content: question }], { add_generation_prompt: true });
const inputs = await processor(prompt, await RawImage.read("picture.png"));
const streamer = new TextStreamer(processor.tokenizer, { skip_prompt: true });
await model.generate({ ...inputs, max_new_tokens: 64, do_sample: false, streamer });
""",
    language="javascript",
)

PACKAGING = Packaging(
    configs=_configs,
    notes=NOTES,
    programs=_programs,
    layout=layout,
    further=image_preprocessor_graph,
)
