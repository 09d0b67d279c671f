"""Build only the text decoder of the target genai, with the same bytes as a full build.

python -m bench.decoder CHECKPOINT OUT RECIPE
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from builder.checkpoint.load import open_checkpoint
from builder.checkpoint.parts import DECODER
from builder.graph import binding
from builder.graph.data_files import fill
from builder.graph.unroll import shortened
from builder.quantization.rules import resolve
from builder.reference.meta_model import empty_model
from builder.stages.export import export
from builder.stages.optimize import optimize
from builder.stages.quantize import calibrated_rows, stored
from builder.targets.graphs import components
from builder.targets.recipe_file import load_recipe
from patches import patches_for
from patches.registry import applied


def write_decoder(folder: Path, out: Path, name: str) -> None:
    """Do what the stages export, optimize and quantize do, for this graph."""
    checkpoint = open_checkpoint(folder)
    recipe = load_recipe(name)
    target = next(target for target in recipe.targets if target.runtime == "genai")
    component = next(part for part in components(checkpoint, target.runtime) if part.name == DECODER)
    # Vision patches would never run here, which is an error.
    text = [patch for patch in patches_for(target.attention) if patch.name.startswith("text_")]
    with applied(text):
        traced = export(checkpoint, empty_model(shortened(checkpoint)), target, component)
    optimized, _ = optimize(traced, target, component.name)
    with TemporaryDirectory() as between:
        # As between two stages: saving drops the metadata of the exporter.
        binding.save(optimized, Path(between) / component.file)
        bound = binding.load(Path(between) / component.file)
    path = out / component.file
    storages = resolve(recipe.rules, checkpoint.tensors)
    if storages:
        bound = stored(path, bound, recipe.precision, storages)
    given = calibrated_rows(checkpoint, storages, out / "calibrated")
    fill([{path: bound}], checkpoint, calibrated=given)


if __name__ == "__main__":
    write_decoder(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
