"""Installed without the checkout: the wheel, and the base install without torch."""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder.checkpoint.load import open_checkpoint
from builder.reference.cases import Case, held_out
from ci.environments import environment, own_packages
from tests.helpers.base_install import base as base
from tests.helpers.base_install import without_extra
from tests.helpers.processes import ROOT, artifacts, checkout, python

TARGETS = ("genai", "onnxruntime")
IMAGE = ROOT / "builder" / "miniature" / "heldout" / "pic002.png"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout, so that nothing of an earlier build gets in."""
    folder = tmp_path_factory.mktemp("wheel")
    done = python("-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, checkout(folder / "tree"), cwd=folder)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel in it, far from the checkout."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    arguments = ("--python", environment(folder), "install", "--no-deps", "--no-index", "--force-reinstall", wheel)
    done = python("-m", "pip", *arguments, cwd=folder, root=None)
    assert done.returncode == 0, done.stderr
    return folder


def question() -> Case:
    """A held-out question about `IMAGE`, and its answer."""
    cases = held_out(open_checkpoint(ROOT / "builder" / "miniature" / "checkpoint"))
    return next(case for case in cases if case.images == (IMAGE,))


def test_the_base_install_is_small_and_complete(base: Path) -> None:
    names = {entry.name for entry in base.iterdir()}
    assert not names & {"torch", "transformers", "onnxscript", "pytest", "builder"}
    assert {"onnxruntime", "onnxruntime_genai", "onnx", "typer"} <= names


@pytest.mark.torch  # to build the bundle
@pytest.mark.parametrize("target", TARGETS)
def test_a_bundle_runs_without_torch(base: Path, bundle: Callable[[str], Path], target: str, tmp_path: Path) -> None:
    case = question()
    done = without_extra(base, "run", bundle(target), "--prompt", case.prompt, "--image", IMAGE, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{case.answer}\n"), done.stderr


@pytest.mark.torch  # to build the bundle
@pytest.mark.parametrize(
    "arguments",
    [
        ["build", "--output", "fresh"],
        ["verify", "{bundle}", "--reference", str(ROOT / "builder" / "miniature" / "checkpoint")],
        ["patches"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_that_need_torch_report_how_to_install_it(
    base: Path, bundle: Callable[[str], Path], arguments: list[str], tmp_path: Path
) -> None:
    folder = str(bundle("genai"))
    done = without_extra(base, *(argument.replace("{bundle}", folder) for argument in arguments), cwd=tmp_path)
    assert done.returncode == 22, done.stderr
    assert 'pip install "qwen3vl-onnx[build]"' in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("fresh/*-*"))


@pytest.mark.seconds
def test_fetch_and_explain_do_without_torch(base: Path, tmp_path: Path) -> None:
    fetched = without_extra(base, "build", "--until", "fetch", "--output", "out", cwd=tmp_path)
    assert fetched.returncode == 0, fetched.stderr
    explained = without_extra(base, "explain", "--output", "out", cwd=tmp_path)
    assert explained.returncode == 0, explained.stderr
    assert explained.stdout.splitlines()[0] == "1-fetch      cached"


@pytest.mark.slow
def test_the_wheel_contains_the_packages_and_their_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        file.relative_to(ROOT).as_posix()
        for package in ("builder", "patches")
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert names == expected
    assert {"builder/recipes/fp32.toml", "patches/verified.toml"} <= names
    assert "builder/miniature/checkpoint/model.safetensors" in names


@pytest.mark.slow
def test_its_packages_are_ours_also_next_to_the_runtimes_own_tools(installed: Path, tmp_path: Path) -> None:
    """onnxruntime-genai has a `builder.py`, and puts its folder on the path."""
    program = (
        "import onnxruntime_genai.models, builder.stages.engine.execute, patches; "
        "print(builder.__file__); print(patches.__file__)"
    )
    done = python("-c", program, cwd=tmp_path, root=None, executable=installed / "bin" / "python")
    assert done.returncode == 0, done.stderr
    packages = own_packages(installed)
    assert done.stdout.splitlines() == [str(packages / name / "__init__.py") for name in ("builder", "patches")]


@pytest.mark.slow
@pytest.mark.torch
def test_the_wheel_builds_the_miniature_and_answers(installed: Path, whole: Path, tmp_path: Path) -> None:
    command = installed / "bin" / "qwen3vl-onnx"
    built = reported(command, "build", "--until", "configure", "--json", cwd=tmp_path)
    output = tmp_path / "outputs" / "miniature-fp32"
    assert Path(built["output"]) == output.relative_to(tmp_path)
    record = json.loads((output / "1-fetch" / "checkpoint.json").read_text(encoding="utf-8"))
    assert Path(record["folder"]) == own_packages(installed) / "builder" / "miniature" / "checkpoint"
    expected = {name: digest for name, digest in artifacts(whole).items() if not name.startswith("8-bundle/")}
    assert artifacts(output) == expected
    case = question()
    for target in TARGETS:
        arguments = ("--prompt", case.prompt, "--image", IMAGE)
        answered = reported(command, "run", whole / "8-bundle" / target, *arguments, "--json", cwd=tmp_path)
        assert answered["text"] == case.answer


def reported(command: Path, *arguments: object, cwd: Path) -> dict[str, Any]:
    """JSON output of the installed command, which must succeed."""
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(command), *map(str, arguments)], cwd=cwd, env=settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    payload: dict[str, Any] = json.loads(done.stdout)
    return payload
