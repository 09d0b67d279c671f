"""Target `openvino`: OpenVINO ≥ 2026.4, which reads the ONNX graphs and their data files as they are.

Ports are those of target `onnxruntime` (builder/graph/ports.py), so that one client serves both. At fp32 there are
standard operators only; weights in blocks of few bits are contrib operators that OpenVINO knows (MatMulNBits,
GatherBlockQuantized). Attention is eager: OpenVINO makes its own fused one of it, and reads no contrib RotaryEmbedding
of the kind that the fused graphs have. The bundle carries builder/targets/clients/openvino_pipeline.py beside
builder/targets/clients/pipeline.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from builder.checkpoint.load import Checkpoint
from builder.targets.config_files import pipeline_settings, vision_processor
from builder.targets.image_preprocessor import image_preprocessor_graph
from builder.targets.spec import Notes, Packaging

if TYPE_CHECKING:
    from builder.targets.recipe import Recipe, Target

PROGRAMS = ("pipeline.py", "openvino_pipeline.py")


def _configs(checkpoint: Checkpoint, recipe: Recipe, target: Target) -> Mapping[str, str]:
    return {
        "vision_processor.json": vision_processor(checkpoint),
        "pipeline.json": pipeline_settings(checkpoint, recipe.max_length),
        **_programs(),
    }


def _programs() -> Mapping[str, str]:
    ours = Path(__file__).parent / "clients"
    return {name: (ours / name).read_text(encoding="utf-8") for name in PROGRAMS}


NOTES = Notes(
    "openvino",
    ("openvino", "numpy", "pillow", "tokenizers"),
    ('python openvino_pipeline.py --prompt "What is this?" --image image.png',),
    (
        "`openvino_pipeline.py` and `pipeline.py` are code: read them before you run a copy that somebody gave you.",
        "It was verified with products in float32 (`INFERENCE_PRECISION_HINT=f32`, no dynamic quantization). "
        "OpenVINO's own choice on a CPU is bfloat16 where the processor has it, which differs by about a hundredth: "
        "`--fast`.",
        "`image_preprocessor.onnx` makes `pixel_values` and `image_grid_thw` of RGB bytes [height, width, 3]. OpenVINO "
        "computes float64 as float32: about one value in ten thousand is off by 1/255, and for a few sizes below the "
        "least number of pixels (343 × 7, say) the grid is another one than transformers'. `openvino_pipeline.py` "
        "does without that graph, and is exact.",
        "The graphs are read as ONNX; `openvino_genai.VLMPipeline` reads another layout.",
    ),
)

PACKAGING = Packaging(configs=_configs, notes=NOTES, programs=_programs, further=image_preprocessor_graph)
