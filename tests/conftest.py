"""Shared fixtures: checkpoints, and builds of them. Tests must not change the session-scoped ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from builder.checkpoint.source import parse_source
from builder.stages.engine.build import Build
from builder.stages.engine.execute import execute
from builder.targets.recipe import Recipe
from builder.targets.recipe_file import load_recipe
from builder.util.files import link
from tests.helpers.checkpoints import MINIATURE, write_shape
from tests.helpers.processes import python
from tests.helpers.toy_stages import build as build
from tests.helpers.toy_stages import demo as demo

if TYPE_CHECKING:
    from builder.reference.model import Reference

# Before torch is imported: models this small are faster on one thread, and do not wait for busy cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

Built = Callable[[Path, Recipe], Path]


@pytest.fixture(scope="session")
def miniature() -> Path:
    """The trained miniature's folder."""
    return MINIATURE


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint(shape)`: the folder of `tests.helpers.checkpoints.SHAPES[shape]`, written once per session."""
    written: dict[str, Path] = {}

    def folder(shape: str) -> Path:
        if shape not in written:
            written[shape] = write_shape(tmp_path_factory.mktemp("shapes") / shape, shape)
        return written[shape]

    return folder


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Common parent of builds, which share traced graphs of the same architecture and targets."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="session")
def built(outputs: Path) -> Built:
    """`built(checkpoint, recipe)`: folders of the stage `configure`, one per target, built once per session."""
    done: dict[tuple[Path, Recipe], Path] = {}

    def folder(checkpoint: Path, recipe: Recipe) -> Path:
        if (checkpoint, recipe) not in done:
            build = Build(parse_source(str(checkpoint)), recipe, outputs / f"{len(done)}-{recipe.name}")
            execute(build, until="configure")
            done[checkpoint, recipe] = build.folder("configure")
        return done[checkpoint, recipe]

    return folder


@pytest.fixture(scope="session")
def miniature_built(built: Built) -> Path:
    """The miniature's folders `genai` and `onnxruntime`, before verification."""
    return built(MINIATURE, load_recipe("fp32"))


@pytest.fixture(scope="session")
def finished(outputs: Path) -> Callable[[str], Path]:
    """`finished(recipe)`: the miniature's verified `genai` bundle of a shipped recipe, built once per session."""
    done: dict[str, Path] = {}

    def folder(recipe: str) -> Path:
        if recipe not in done:
            build = Build(parse_source(str(MINIATURE)), load_recipe(recipe), outputs / f"finished-{recipe}")
            execute(build)
            done[recipe] = build.folder("bundle") / "genai"
        return done[recipe]

    return folder


@pytest.fixture
def lossy(finished: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """`lossy(recipe)`: a copy of that bundle whose files a test may replace (they are links); no evidence, no sizes."""

    def folder(recipe: str) -> Path:
        copy = tmp_path / f"lossy-{recipe}"
        for file in sorted(file for file in finished(recipe).iterdir() if file.is_file()):
            link(file, copy / file.name)
        manifest = json.loads((copy / "manifest.json").read_text())
        (copy / "manifest.json").unlink()
        (copy / "manifest.json").write_text(json.dumps({**manifest, "files": {}}))
        return copy

    return folder


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature's complete output folder, verified and bundled; takes minutes, for slow tests only."""
    folder = tmp_path_factory.mktemp("whole")
    done = python("-m", "builder", "build", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "outputs" / "miniature-fp32"


@pytest.fixture
def bundle(miniature_built: Path, tmp_path: Path) -> Callable[[str], Path]:
    """`bundle(target)`: a copy of the miniature's bundle whose files a test may replace (they are links)."""

    def folder(target: str) -> Path:
        copy = tmp_path / target
        for file in sorted((miniature_built / target).iterdir()):
            link(file, copy / file.name)
        (copy / "manifest.json").unlink()  # a link: writing through it would change the stage's file
        (copy / "manifest.json").write_text(json.dumps({"target": target}))
        return copy

    return folder


@pytest.fixture(scope="session")
def reference() -> Reference:
    """PyTorch with the miniature's weights."""
    from builder.checkpoint.load import open_checkpoint
    from builder.reference.model import Reference

    return Reference(open_checkpoint(MINIATURE))


@pytest.fixture
def sharded(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A bf16 checkpoint in three shards that a test may change."""
    return Path(shutil.copytree(checkpoint("biased"), tmp_path / "copy"))


@pytest.fixture
def single(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """An fp16 checkpoint in one file that a test may change."""
    return Path(shutil.copytree(checkpoint("deepstack0"), tmp_path / "single"))
