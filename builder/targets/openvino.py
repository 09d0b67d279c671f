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
from builder.targets.spec import Packaging

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


PACKAGING = Packaging(configs=_configs, programs=_programs, further=image_preprocessor_graph)
