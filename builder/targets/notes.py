"""What the model card says about each target's runtime.

Only the card reads this table: a changed sentence re-runs `bundle` and no other stage.
"""

from __future__ import annotations

from dataclasses import dataclass

from builder.targets.runners.node import LIBRARY, PINNED_LIBRARY


@dataclass(frozen=True)
class Notes:
    """The section of a model card about a runtime.

    Args:
        library: `library_name` on the Hugging Face Hub.
        packages: PyPI packages that the bundle needs.
        run: shell commands that run the bundle from its folder.
        limits: known limitations, a sentence or two each.
        code: a program that runs the bundle from its folder.
        language: Markdown's name for the language of `code`.
    """

    library: str
    packages: tuple[str, ...]
    run: tuple[str, ...]
    limits: tuple[str, ...]
    code: str = ""
    language: str = "python"


NOTES: dict[str, Notes] = {
    "genai": Notes(
        "onnxruntime-genai",
        ("onnxruntime-genai",),
        (),
        (
            "The runtime's image processor is bit-identical to that of transformers for images that need no "
            "resizing. For "
            "others, the grid can differ (sides ≡ 16 mod 64), and so can single pixels: resize them first, or pass "
            "`pixel_values`, as `qwen3vl-onnx run` does.",
            "The runtime's JPEG decoder differs from PIL's, and it does not rotate images by their EXIF orientation.",
            "A padded batch gives silently wrong results in this runtime (0.18): use prompts of equal length.",
            "A second turn with an image on the same generator gives silently wrong results in this runtime (0.18): "
            "create "
            "a new generator for each conversation with images.",
            "The runtime masks every padding token in a prompt, so `pad_token_id` is the video token, which prompts "
            "do not "
            "contain.",
            "Logits are returned for the last position only.",
        ),
        """\
import json

import onnxruntime_genai as og

model = og.Model(".")
processor = model.create_multimodal_processor()
with open("pipeline.json", encoding="utf-8") as file:
    template = json.load(file)["prompt"]
prompt = template["prefix"] + template["image"] + "What is this?" + template["suffix"]
params = og.GeneratorParams(model)
params.set_search_options(do_sample=False)
generator = og.Generator(model, params)
generator.set_inputs(processor(prompt, images=og.Images.open("image.png")))
stream = processor.create_stream()
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
""",
    ),
    "onnxruntime": Notes(
        "onnx",
        ("onnxruntime", "numpy", "pillow", "tokenizers"),
        ('python pipeline.py --prompt "What is this?" --image image.png',),
        (
            "`pipeline.py` is code, and the reference for ports to other languages: read it before you run a copy from "
            "someone else.",
            "`image_preprocessor.onnx` computes `pixel_values` and `image_grid_thw` from RGB bytes [height, width, 3], "
            "bit-identical to transformers, for clients without a preprocessor. Before calling it, decode the file, "
            "rotate "
            "the image by its EXIF orientation, and reject images with one side more than 200 times the other.",
            "Attention scores are computed in blocks of query rows; memory use grows with the number of patches.",
        ),
    ),
    "openvino": Notes(
        "openvino",
        ("openvino", "numpy", "pillow", "tokenizers"),
        ('python openvino_pipeline.py --prompt "What is this?" --image image.png',),
        (
            "`openvino_pipeline.py` and `pipeline.py` are code: read them before you run a copy from someone else.",
            "The bundle was verified with float32 computation (`INFERENCE_PRECISION_HINT=f32`, no dynamic "
            "quantization). "
            "By default, OpenVINO computes in bfloat16 on CPUs that support it, which differs by about 1 %: `--fast`.",
            "`image_preprocessor.onnx` computes `pixel_values` and `image_grid_thw` from RGB bytes [height, width, 3]. "
            "OpenVINO computes its float64 operators in float32: about one value in ten thousand differs by 1/255, "
            "and for "
            "a few sizes below the minimum number of pixels (such as 343 × 7) the grid differs from that of "
            "transformers. "
            "`openvino_pipeline.py` does not use this graph and is exact.",
            "The graphs are in ONNX format; `openvino_genai.VLMPipeline` expects a different layout.",
        ),
    ),
    "transformersjs": Notes(
        "transformers.js",
        (),
        (f"ONNXRUNTIME_NODE_INSTALL=skip npm install {LIBRARY}@{PINNED_LIBRARY}",),
        (
            "The library's image processor equals that of transformers for RGB PNGs that need no resizing. For others, "
            "grid and pixels differ; `onnx/image_preprocessor.onnx` computes both as transformers does, for any "
            "size (see "
            "`demo/worker.mjs`; in browsers it needs a build of onnxruntime-web with float64, as loaded there).",
            "The library's image processor takes one image per prompt: it treats several images as frames of one "
            "video.",
            "Without an image, the library (4.3.1) gives generated tokens positions far beyond the prompt; the "
            "decoder in "
            "this bundle corrects them by clamping positions to the number of tokens.",
            "Logits are returned for the last position only.",
            "On WebGPU, the bundle was run with a software adapter in fp32 and int4; fp16 and real GPUs are untested.",
            "A browser loads each data file into one contiguous buffer: files over 2 GB do not load there.",
            "`demo/` contains code: read it before you serve a copy from someone else.",
        ),
        """\
import { AutoProcessor, Qwen3VLForConditionalGeneration, RawImage, TextStreamer, env } from "@huggingface/transformers";

env.allowRemoteModels = false;
const folder = process.cwd();
const processor = await AutoProcessor.from_pretrained(folder);
const model = await Qwen3VLForConditionalGeneration.from_pretrained(folder);
const question = [{ type: "image" }, { type: "text", text: "What is this?" }];
const prompt = processor.apply_chat_template([{ role: "user", content: question }], { add_generation_prompt: true });
const inputs = await processor(prompt, await RawImage.read("image.png"));
const streamer = new TextStreamer(processor.tokenizer, { skip_prompt: true });
await model.generate({ ...inputs, max_new_tokens: 64, do_sample: false, streamer });
""",
        language="javascript",
    ),
}
