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
from builder.targets.spec import Notes, Packaging

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


NOTES = Notes(
    "onnx",
    ("onnxruntime", "numpy", "pillow", "tokenizers"),
    ('python pipeline.py --prompt "What is this?" --image image.png',),
    (
        "`pipeline.py` is code, and the reference for ports to other languages: read it before you run a copy from "
        "someone else.",
        "`image_preprocessor.onnx` computes `pixel_values` and `image_grid_thw` from RGB bytes [height, width, 3], "
        "bit-identical to transformers, for clients without a preprocessor. Before calling it, decode the file, rotate "
        "the image by its EXIF orientation, and reject images with one side more than 200 times the other.",
        "Attention scores are computed in blocks of query rows; memory use grows with the number of patches.",
    ),
)

PACKAGING = Packaging(configs=_configs, notes=NOTES, programs=_programs, further=image_preprocessor_graph)
