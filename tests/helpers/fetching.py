"""The stage `fetch` without the stages around it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from builder.checkpoint.source import Source
from builder.stages.engine.build import Build
from builder.stages.fetch import run
from builder.targets.recipe_file import load_recipe

SHARD = "model-00001-of-00003.safetensors"


def fetch_into(source: Source, out: Path, *, rehash: bool = False) -> dict[str, Any]:
    """Run the stage."""
    out.mkdir(exist_ok=True)
    return run(Build(source=source, recipe=load_recipe(), output=out.parent, rehash=rehash), out)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
