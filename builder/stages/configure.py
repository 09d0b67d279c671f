"""Stage 6: lay out each target's graphs and data, and write its configuration, tokenizer and chat template.

Token ids, sizes, means and layer counts all come from the checkpoint. Data files are linked, not read. The manifest
starts here, with each graph's role.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from builder.bundle.layout import GRAPH, MANIFEST
from builder.targets.graphs import components
from builder.targets.registry import PACKAGING
from builder.targets.spec import by_name
from builder.util.files import link, write_text
from builder.util.json_files import read_json

if TYPE_CHECKING:
    from builder.checkpoint.load import Checkpoint
    from builder.stages.engine.build import Build
    from builder.targets.recipe import Recipe, Target

COPIED = ("tokenizer.json", "generation_config.json", "config.json", "preprocessor_config.json")
TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"


def run(build: Build, out: Path) -> Mapping[str, object]:
    """Lay out and configure every target, and return the names of the files written for each."""
    facts: dict[str, object] = {}
    for target in build.recipe.targets:
        folder = out / target.runtime
        roles = lay_out(build.folder("quantize") / target.runtime, build.checkpoint, build.recipe, target, folder)
        described = {"target": target.runtime, "graphs": {name: {"role": role} for name, role in roles.items()}}
        write_text(folder / MANIFEST, json.dumps(described, indent=1) + "\n")
        facts[target.runtime] = configure(build, target, folder)
    return facts


def lay_out(filled: Path, checkpoint: Checkpoint, recipe: Recipe, target: Target, folder: Path) -> dict[str, str]:
    """Write a target's graphs and data to `folder`, and map each graph file to its role.

    Args:
        filled: folder of the graphs that `quantize` wrote.
    """
    packaging = PACKAGING[target.runtime]
    names = [component.name for component in components(checkpoint, target.runtime)]
    moved: dict[str, str] = {}
    for name in names:
        place, own = packaging.layout(name, recipe), by_name(name, recipe)
        moved |= {own.graph: place.graph, own.data: place.data}
    for file in sorted(filled.iterdir()):
        destination = folder / moved[file.name]
        if file.suffix == GRAPH and any(old != new for old, new in moved.items()):
            _write_referring(file, destination, moved)
        else:
            link(file, destination)
    roles = {packaging.layout(name, recipe).graph: name for name in names}
    for role, model in packaging.further(checkpoint, recipe).items():
        name = packaging.layout(role, recipe).graph
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(model.SerializeToString(deterministic=True))
        roles[name] = role
    return roles


def _write_referring(source: Path, destination: Path, moved: Mapping[str, str]) -> None:
    """Write a graph whose external data refers to the moved data files."""
    import onnx
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    model = onnx.load(source, load_external_data=False)
    own = PurePosixPath(moved[source.name]).parent
    for tensor in filter(uses_external_data, _get_all_tensors(model)):
        for entry in tensor.external_data:
            if entry.key == "location":
                data = PurePosixPath(moved[entry.value])
                assert data.parent == own, f"a graph's data must be in its folder: {data} is not in {own}"
                entry.value = data.name
    destination.parent.mkdir(parents=True, exist_ok=True)
    destination.write_bytes(model.SerializeToString(deterministic=True))


def configure(build: Build, target: Target, folder: Path) -> list[str]:
    """Write a target's configuration to `folder`, and return the names of its files."""
    checkpoint = build.checkpoint
    files = dict(PACKAGING[target.runtime].configs(checkpoint, build.recipe, target))
    files[TEMPLATE] = checkpoint.chat_template
    files[TOKENIZER_CONFIG] = _tokenizer_config(checkpoint)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    copied = [name for name in COPIED if name in checkpoint.files and name not in files]
    for name in copied:
        shutil.copyfile(checkpoint.folder / name, folder / name)
    return sorted((*files, *copied))


def _tokenizer_config(checkpoint: Checkpoint) -> str:
    """Return the tokenizer's settings with the chat template, which runtimes read from there."""
    known = TOKENIZER_CONFIG in checkpoint.files
    settings = read_json(checkpoint.folder / TOKENIZER_CONFIG) if known else {}
    settings["chat_template"] = checkpoint.chat_template
    return json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
