"""`qwen3vl-onnx run` on bundles of both runtimes whose answers numpy computes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from builder.bundle.generate import answer, open_bundle
from builder.checkpoint.load import open_checkpoint
from builder.reference.cases import SUITE
from builder.targets.clients import pipeline
from builder.targets.graphs import GRAPHS
from builder.util.errors import BundleError, ImageError, MissingPackageError, PromptError
from tests.helpers.checkpoints import MINIATURE
from tests.helpers.toy_graphs import Toy, toy

IMAGES = SUITE / "images"
STOPS = (4058, 4056)
RUNTIMES = ("genai", "onnxruntime")


@pytest.fixture(scope="module")
def model() -> Toy:
    return toy(open_checkpoint(MINIATURE), levels=3, seed=3)


@pytest.fixture(scope="module")
def bundles(model: Toy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return {runtime: model.write(folder / runtime, runtime) for runtime in RUNTIMES}


@pytest.fixture
def copied(bundles: dict[str, Path], runtime: str, tmp_path: Path) -> Path:
    """A bundle that a test may change."""
    return Path(shutil.copytree(bundles[runtime], tmp_path / runtime))


def ask(bundle: Path, prompt: str = "What is it?", *images: Path, max_new_tokens: int = 8) -> str:
    return answer(bundle, prompt, images, max_new_tokens=max_new_tokens, on_text=lambda text: None).text


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    "images",
    [[], ["sixteen.png"], ["wide.png", "tall.png"], ["plain.png", "plain.png"], ["photo.jpg", "grey.png", "alpha.png"]],
    ids=str,
)
def test_both_runtimes_answer_as_the_graphs_do(
    runtime: str, images: list[str], bundles: dict[str, Path], model: Toy
) -> None:
    paths = [IMAGES / name for name in images]
    pieces: list[str] = []
    result = answer(bundles[runtime], "What is it?", paths, max_new_tokens=12, on_text=pieces.append)
    inputs = open_bundle(bundles[runtime]).prepare("What is it?", paths)
    expected = model.tokens(inputs, 12)
    assert not set(expected) & set(STOPS)
    assert result.token_ids == tuple(expected)
    assert result.prompt_tokens == inputs.input_ids.shape[1]
    tokenizer = pipeline.load_tokenizer(MINIATURE / "tokenizer.json")
    assert result.text == "".join(pieces) == tokenizer.decode(expected)
    assert not (bundles[runtime] / "__pycache__").exists()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_that_is_not_an_image_is_an_image_error(runtime: str, bundles: dict[str, Path]) -> None:
    with pytest.raises(ImageError, match=r"manifest\.json cannot be read as an image"):
        ask(bundles[runtime], "What is it?", bundles[runtime] / "manifest.json")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_text_with_an_image_token_is_a_prompt_error(runtime: str, bundles: dict[str, Path]) -> None:
    with pytest.raises(PromptError, match=r"the text contains <\|image_pad\|>"):
        ask(bundles[runtime], "What is <|image_pad|>?")


@pytest.mark.parametrize(("runtime", "most"), [("genai", 4096), ("onnxruntime", 512)])
def test_an_answer_that_could_be_too_long_is_a_prompt_error(runtime: str, most: int, bundles: dict[str, Path]) -> None:
    seq = open_bundle(bundles[runtime]).prepare("What is it?", []).input_ids.shape[1]
    with pytest.raises(PromptError) as caught:
        ask(bundles[runtime], max_new_tokens=most - seq + 1)
    assert caught.value.expected == f"at most {most} tokens together"
    assert caught.value.next == f"--max-new-tokens {most - seq}"


def test_a_token_that_the_runtime_masks_is_refused(bundles: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundles["genai"], tmp_path / "genai"))
    file = folder / "genai_config.json"
    config = json.loads(file.read_text())
    config["model"]["pad_token_id"] = STOPS[1]
    file.write_text(json.dumps(config))
    with pytest.raises(PromptError, match=r"the text contains <\|endoftext\|>, which the runtime treats as padding"):
        ask(folder, "What is <|endoftext|>?")


def test_a_folder_that_is_not_a_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle") as caught:
        ask(tmp_path)
    assert "manifest.json" in str(caught.value.found)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(BundleError, match="is not a bundle"):
        ask(tmp_path)
    (tmp_path / "manifest.json").write_text('{"target": "coreml"}')
    with pytest.raises(BundleError, match="cannot be run here") as caught:
        ask(tmp_path)
    assert (caught.value.expected, caught.value.found) == (" or ".join(GRAPHS), "coreml")


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("file", ["model.onnx", "vision_processor.json", "pipeline.json", "tokenizer.json"])
def test_a_bundle_without_a_file_is_a_bundle_error(copied: Path, file: str) -> None:
    (copied / file).unlink()
    with pytest.raises(BundleError, match=r"cannot be opened|does not load|is not in"):
        ask(copied)


@pytest.mark.parametrize("runtime", ["onnxruntime"])
@pytest.mark.parametrize("source", [None, "def broken(", "x = 1"])
def test_a_bundle_with_a_broken_pipeline_is_a_bundle_error(copied: Path, source: str | None) -> None:
    (copied / "pipeline.py").unlink()
    if source is not None:
        (copied / "pipeline.py").write_text(source)
    with pytest.raises(BundleError, match="cannot be opened"):
        ask(copied)


@pytest.mark.parametrize("runtime", ["onnxruntime"])
def test_a_bundle_runs_its_own_pipeline(copied: Path) -> None:
    file = copied / "pipeline.py"
    file.write_text(file.read_text(encoding="utf-8").replace("logits.argmax()", "logits.argmin()"), encoding="utf-8")
    inputs = open_bundle(copied).prepare("What is it?", [])
    assert isinstance(inputs.input_ids, np.ndarray)
    least = answer(copied, "What is it?", [], max_new_tokens=4, on_text=lambda text: None)
    assert list(least.token_ids) != list(pipeline.Pipeline.load(copied).generate(inputs, 4))


@pytest.mark.parametrize(("runtime", "package"), [("genai", "onnxruntime_genai"), ("onnxruntime", "onnxruntime")])
def test_a_missing_runtime_is_named(
    runtime: str, package: str, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError) as caught:
        ask(bundles[runtime])
    assert str(caught.value.next) == f"pip install {package.replace('_', '-')}"
