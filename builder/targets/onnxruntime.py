"""Target `onnxruntime`: plain sessions from any language. Standard ONNX operators only, one opset ≤ 20.

Ports: see builder/graph/ports.py. The bundle carries builder/targets/clients/pipeline.py, the reference for ports to
other languages.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.checkpoint.load import Checkpoint
from builder.graph.ports import DECODER, EMBEDDINGS, VISION, plain_components
from builder.targets.config_files import pipeline_settings, vision_processor
from builder.targets.image_preprocessor import image_preprocessor_graph
from builder.targets.spec import Notes, Runtime

if TYPE_CHECKING:
    from builder.targets.clients.pipeline import Inputs
    from builder.targets.recipe_file import Recipe, Target

PIPELINE = "pipeline.py"
PASSES = {
    VISION: ("simplify", "lower_segment_attention_eager"),
    EMBEDDINGS: (),
    DECODER: ("simplify", "gemm_head", "fold_weight_transposes"),
}


def plain_module(checkpoint: Checkpoint, model: Any, graph: str, fused: bool) -> Any:
    """The module of one graph with `plain_components`."""
    from builder.graph import modules

    levels = len(checkpoint.vision.deepstack)
    if graph == VISION:
        return modules.VisionEncoder(model, packed=False)
    if graph == EMBEDDINGS:
        return modules.Embeddings(model)
    return modules.TextDecoder(model, levels, packed=False, fused=fused)


def _configs(checkpoint: Checkpoint, recipe: Recipe, target: Target) -> Mapping[str, str]:
    return {
        "vision_processor.json": vision_processor(checkpoint),
        "pipeline.json": pipeline_settings(checkpoint, recipe.max_length),
        **_programs(),
    }


def _programs() -> Mapping[str, str]:
    return {PIPELINE: (Path(__file__).parent / "clients" / PIPELINE).read_text(encoding="utf-8")}


class PipelinePlayer:
    """A bundle through its pipeline: ours, or the copy that lies in it.

    Args:
        module: builder.targets.clients.pipeline, or that copy.
        opened: a `Pipeline` of it.
    """

    padding = own = not_run = None

    def __init__(self, module: Any, opened: Any) -> None:
        self.module, self.pipeline = module, opened
        self.settings, self.vision = self.pipeline.settings, self.pipeline.vision
        self.tokenizer = self.pipeline.tokenizer

    @property
    def most_tokens(self) -> int:
        return int(self.settings.max_length)

    def prepare(self, prompt: str, images: Sequence[Path]) -> Inputs:
        inputs: Inputs = self.pipeline.prepare(prompt, images)
        return inputs

    def tokens(self, inputs: Inputs, max_new_tokens: int, min_new_tokens: int = 0) -> Iterator[int]:
        tokens: Iterator[int] = self.pipeline.generate(inputs, max_new_tokens, min_new_tokens)
        return tokens

    def text(self, tokens: Sequence[int]) -> str:
        return str(self.pipeline.text(tokens))


def _play(folder: Path, asked: bool) -> PipelinePlayer:
    from builder.targets.clients import pipeline

    module = _load_module(folder / PIPELINE) if asked else pipeline
    return PipelinePlayer(module, module.Pipeline.load(folder))


def _load_module(path: Path) -> Any:
    """The module in `path`, without the compiled copy that an import would leave in the bundle."""
    source = path.read_text(encoding="utf-8")
    module = types.ModuleType("bundled_pipeline")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where its dataclasses look for their module
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


NOTES = Notes(
    "onnx",
    ("onnxruntime", "numpy", "pillow", "tokenizers"),
    ('python pipeline.py --prompt "What is this?" --image picture.png',),
    (
        "`pipeline.py` is code, and the reference for ports: read it before you run a copy that somebody gave you.",
        "`image_preprocessor.onnx` makes `pixel_values` and `image_grid_thw` of RGB bytes [height, width, 3], bit for "
        "bit as transformers does, for clients without a preprocessor. Decode the file, turn the picture by its EXIF "
        "orientation, and refuse one that is more than 200 times as long as wide before.",
        "Attention scores are computed in blocks of query rows; memory grows with the number of patches.",
    ),
)

RUNTIME = Runtime(
    name="onnxruntime",
    opset=18,
    domains=frozenset({""}),
    packed=False,
    merges=False,
    attentions=("eager",),
    ports=plain_components,
    module=plain_module,
    passes=lambda graph, fused: PASSES[graph],
    configs=_configs,
    play=_play,
    programs=_programs,
    notes=NOTES,
    further=image_preprocessor_graph,
)
