"""Target `onnxruntime`: plain ONNX Runtime sessions from any language, with standard ONNX operators only.

The bundle contains builder/targets/clients/pipeline.py, the reference for ports to other languages.
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

PIPELINE = "pipeline.py"


def _configs(checkpoint: Checkpoint, recipe: Recipe, target: Target) -> Mapping[str, str]:
    return {
        "vision_processor.json": vision_processor(checkpoint),
        "pipeline.json": pipeline_settings(checkpoint, recipe.max_length),
        **_programs(),
    }


def _programs() -> Mapping[str, str]:
    return {PIPELINE: (Path(__file__).parent / "clients" / PIPELINE).read_text(encoding="utf-8")}


PACKAGING = Packaging(configs=_configs, programs=_programs, further=image_preprocessor_graph)
