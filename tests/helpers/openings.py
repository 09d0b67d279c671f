"""Count how often a checkpoint is opened and validated."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest

from builder.checkpoint import load
from builder.checkpoint.safetensors import Tensor


def count_openings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Record the folder of every `open_checkpoint` from here on."""
    folders: list[Path] = []
    index_tensors = vars(load)["index_tensors"]

    def counted(folder: Path, files: Collection[str]) -> dict[str, Tensor]:
        folders.append(folder)
        found: dict[str, Tensor] = index_tensors(folder, files)
        return found

    monkeypatch.setattr(load, "index_tensors", counted)
    return folders
