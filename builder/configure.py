"""Stage 6: the files beside the graphs.

In: filled graphs and the checkpoint. Out: a folder a target with graphs (linked), configuration, tokenizer, chat
template and generation settings. Guaranteed: no token id, size, mean or layer count is a literal; all come from the
checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from builder.files import link
from builder.json_file import read_json
from builder.targets import TARGETS

if TYPE_CHECKING:
    from builder.checkpoint import Checkpoint
    from builder.recipe import Target
    from builder.stage import Build

COPIED = ("tokenizer.json", "generation_config.json", "config.json", "preprocessor_config.json")
TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"


def run(build: Build, out: Path) -> Mapping[str, object]:
    """Returns the names of the files written a target."""
    facts: dict[str, object] = {}
    for target in build.recipe.targets:
        folder = out / target.runtime
        graphs = sorted((build.folder("quantize") / target.runtime).iterdir())
        for file in graphs:
            link(file, folder / file.name)
        facts[target.runtime] = configure(build, target, folder)
    return facts


def configure(build: Build, target: Target, folder: Path) -> list[str]:
    """Writes the configuration of one target into `folder`."""
    checkpoint = build.checkpoint
    files = dict(TARGETS[target.runtime].configs(checkpoint, build.recipe, target))
    files[TEMPLATE] = checkpoint.chat_template
    files[TOKENIZER_CONFIG] = _tokenizer_config(checkpoint)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    copied = [name for name in COPIED if name in checkpoint.files]
    for name in copied:
        shutil.copyfile(checkpoint.folder / name, folder / name)
    return sorted((*files, *copied))


def _tokenizer_config(checkpoint: Checkpoint) -> str:
    """The checkpoint's, with the chat template inside: the runtime looks for it there."""
    known = TOKENIZER_CONFIG in checkpoint.files
    settings = read_json(checkpoint.folder / TOKENIZER_CONFIG) if known else {}
    settings["chat_template"] = checkpoint.chat_template
    return json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
