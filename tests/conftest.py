"""Checkpoints that tests share and none may change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import MINIATURE, write_shape


@pytest.fixture(scope="session")
def miniature() -> Path:
    """The trained miniature's folder."""
    return MINIATURE


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint(shape)`: the folder of `tests.checkpoints.SHAPES[shape]`, written once a session."""
    written: dict[str, Path] = {}

    def folder(shape: str) -> Path:
        if shape not in written:
            written[shape] = write_shape(tmp_path_factory.mktemp("shapes") / shape, shape)
        return written[shape]

    return folder


@pytest.fixture
def sharded(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A bf16 checkpoint in three shards that a test may change."""
    return Path(shutil.copytree(checkpoint("biased"), tmp_path / "copy"))


@pytest.fixture
def single(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """An fp16 checkpoint in one file that a test may change."""
    return Path(shutil.copytree(checkpoint("deepstack0"), tmp_path / "single"))
