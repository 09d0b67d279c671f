"""Target `onnxruntime`: plain sessions from any language. Standard ONNX operators only, one opset ≤ 20.

Ports: see builder/contract.py. The bundle carries builder/pipeline.py, the reference for ports to other languages.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.checkpoint import Checkpoint
from builder.contract import DECODER, EMBEDDINGS, VISION
from builder.recipe import Recipe, Target
from builder.targets.runtime import Runtime
from builder.targets.settings import pipeline_settings, vision_processor

PASSES = {
    VISION: ("simplify", "lower_segment_attention_eager"),
    EMBEDDINGS: (),
    DECODER: ("simplify", "gemm_head", "fold_weight_transposes"),
}


def _module(checkpoint: Checkpoint, model: Any, graph: str, fused: bool) -> Any:
    from builder import modules

    levels = len(checkpoint.vision.deepstack)
    if graph == VISION:
        return modules.VisionEncoder(model, packed=False)
    if graph == EMBEDDINGS:
        return modules.Embeddings(model)
    return modules.TextDecoder(model, levels, packed=False, fused=fused)


def _configs(checkpoint: Checkpoint, recipe: Recipe, target: Target) -> Mapping[str, str]:
    pipeline = Path(__file__).parents[1] / "pipeline.py"
    return {
        "vision_processor.json": vision_processor(checkpoint),
        "pipeline.json": pipeline_settings(checkpoint, recipe.max_length),
        "pipeline.py": pipeline.read_text(encoding="utf-8"),
    }


RUNTIME = Runtime(
    name="onnxruntime",
    opset=18,
    domains=frozenset({""}),
    module=_module,
    passes=lambda graph, fused: PASSES[graph],
    configs=_configs,
)
