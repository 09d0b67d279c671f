"""The stand-alone pipeline's loop, on graphs whose answers numpy knows."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from builder.checkpoint.load import open_checkpoint
from builder.reference.cases import SUITE
from builder.targets.clients import pipeline
from builder.targets.clients.pipeline import Pipeline, TextError
from tests.helpers.checkpoints import MINIATURE
from tests.helpers.toy_graphs import Toy, toy

IMAGES = SUITE / "images"
STOPS = (4058, 4056)


@pytest.fixture(scope="module", params=[3, 0, 1], ids="D = {}".format)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Toy, Path]:
    model = toy(open_checkpoint(MINIATURE), levels=request.param, seed=request.param)
    return model, model.write(tmp_path_factory.mktemp("toy") / "onnxruntime", "onnxruntime")


@pytest.mark.parametrize("images", [[], ["sixteen.png"], ["wide.png", "tall.png", "photo.jpg"]], ids=str)
def test_tokens_are_those_of_the_graphs(bundle: tuple[Toy, Path], images: list[str]) -> None:
    model, folder = bundle
    opened = Pipeline.load(folder)
    inputs = opened.prepare("What is it?", [IMAGES / name for name in images])
    tokens = list(opened.generate(inputs, 16, 16))
    assert tokens == model.tokens(inputs, 16, STOPS)
    assert opened.text(tokens) == opened.tokenizer.decode(tokens)


def test_a_long_prompt_is_read_in_pieces(bundle: tuple[Toy, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = bundle
    monkeypatch.setattr(pipeline, "PREFILL", 7)
    opened = Pipeline.load(folder)
    inputs = opened.prepare("What is it?", [IMAGES / "tall.png"])
    assert inputs.input_ids.shape[1] > 50
    assert list(opened.generate(inputs, 8, 8)) == model.tokens(inputs, 8, STOPS)


def test_each_input_of_the_decoder_counts(bundle: tuple[Toy, Path]) -> None:
    model, folder = bundle
    opened = Pipeline.load(folder)
    inputs = opened.prepare("What is it?", [IMAGES / "tall.png"])
    given = (*opened.embed(inputs), inputs.position_ids, opened.empty_past())
    expected = model.logits(inputs.input_ids, inputs.position_ids, inputs.pixel_values)
    np.testing.assert_allclose(opened.decode(*given)[0], expected, rtol=1e-3, atol=1e-3)
    embeds, deepstack, positions, past = given
    broken = [(embeds, deepstack, positions[::-1], past), (embeds * 0, deepstack, positions, past)]
    broken += [(embeds, deepstack * 0, positions, past)] if opened.settings.deepstack else []
    for wrong in broken:
        assert np.abs(opened.decode(*wrong)[0] - expected).max() > 0.02


def test_features_stand_in_for_image_tokens_alone(bundle: tuple[Toy, Path]) -> None:
    model, folder = bundle
    opened = Pipeline.load(folder)
    inputs = opened.prepare("What is it?", [IMAGES / "plain.png", IMAGES / "wide.png"])
    embeds, deepstack = opened.embed(inputs)
    assert inputs.pixel_values is not None
    features = inputs.pixel_values.reshape(-1, len(model.weights["project"])) @ model.weights["project"]
    is_image = inputs.input_ids[0] == opened.settings.image_token_id
    hidden = opened.settings.hidden
    assert deepstack.shape == (opened.settings.deepstack, *embeds.shape)
    np.testing.assert_allclose(embeds[0, is_image], features[:, :hidden], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(embeds[0, ~is_image], model.weights["embed"][inputs.input_ids[0, ~is_image], :hidden])
    for level, part in enumerate(deepstack):
        expected = features[:, (level + 1) * hidden : (level + 2) * hidden]
        np.testing.assert_allclose(part[0, is_image], expected, rtol=1e-4, atol=1e-5)
        assert not part[0, ~is_image].any()


def test_a_stop_token_ends_the_answer(bundle: tuple[Toy, Path]) -> None:
    model, folder = bundle
    opened = Pipeline.load(folder)
    inputs = opened.prepare("What is it?")
    free = model.tokens(inputs, 6)
    stopping = replace(opened, settings=replace(opened.settings, eos_token_ids=(free[2], free[0])))
    assert list(stopping.generate(inputs, 6)) == free[:1]
    barred = model.tokens(inputs, 3, (free[2], free[0]))
    held = list(stopping.generate(inputs, 6, 3))
    assert held[:3] == barred


def test_answers_beyond_the_length_are_refused(bundle: tuple[Toy, Path]) -> None:
    opened = Pipeline.load(bundle[1])
    inputs = opened.prepare("What is it?")
    with pytest.raises(TextError, match=r"\+ 512 tokens are more than 512"):
        next(opened.generate(inputs, 512))


@pytest.mark.seconds
def test_a_bundle_answers_by_itself(bundle: tuple[Toy, Path]) -> None:
    model, folder = bundle

    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", str(folder / "pipeline.py"), "--prompt", "What is it?", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8")

    image = IMAGES / "grey.png"
    answered = ask("--image", str(image), "--max-new-tokens", "5")
    inputs = Pipeline.load(folder).prepare("What is it?", [image])
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout == Pipeline.load(folder).text(model.tokens(inputs, 5, STOPS)) + "\n"
    refused = ask("--image", str(folder / "pipeline.py"))
    assert refused.returncode == 2
    assert "cannot be read as an image" in refused.stderr
    assert not (folder / "__pycache__").exists()
