"""Target `openvino`: OpenVINO ≥ 2026.4, which reads ONNX graphs and their data files directly.

The ports are those of target `onnxruntime`, so that one client serves both: the bundle contains
builder/targets/clients/openvino_pipeline.py, which uses builder/targets/clients/pipeline.py.
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
        "`openvino_pipeline.py` and `pipeline.py` are code: read them before you run a copy from someone else.",
        "The bundle was verified with float32 computation (`INFERENCE_PRECISION_HINT=f32`, no dynamic quantization). "
        "By default, OpenVINO computes in bfloat16 on CPUs that support it, which differs by about 1 %: `--fast`.",
        "`image_preprocessor.onnx` computes `pixel_values` and `image_grid_thw` from RGB bytes [height, width, 3]. "
        "OpenVINO computes its float64 operators in float32: about one value in ten thousand differs by 1/255, and for "
        "a few sizes below the minimum number of pixels (such as 343 × 7) the grid differs from that of transformers. "
        "`openvino_pipeline.py` does not use this graph and is exact.",
        "The graphs are in ONNX format; `openvino_genai.VLMPipeline` expects a different layout.",
    ),
)

PACKAGING = Packaging(configs=_configs, notes=NOTES, programs=_programs, further=image_preprocessor_graph)
