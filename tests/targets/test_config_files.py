"""Configuration files: every value comes from the checkpoint or the recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builder.checkpoint.chat_template import token_text
from builder.checkpoint.load import open_checkpoint
from builder.targets.genai import genai_config
from builder.targets.recipe import Recipe, Target
from builder.targets.recipe_file import load_recipe
from builder.targets.registry import PACKAGING
from tests.helpers.checkpoints import SHAPES, write_checkpoint, write_shape

GENAI, PLAIN = Target("genai", "fused"), Target("onnxruntime", "eager")
RECIPE = Recipe("fp32", "fp32", (GENAI, PLAIN), 4096)


def recipe(max_length: int) -> Recipe:
    return replace(load_recipe(), max_length=max_length)


def edited(folder: Path, file: str, **changes: Any) -> None:
    settings = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps(settings | changes), encoding="utf-8")


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_genai_config_follows_the_checkpoint(shape: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_shape(tmp_path / "c", shape))
    config = genai_config(checkpoint, recipe(4096), fused=True)
    model, text, vision = config["model"], checkpoint.config["text_config"], checkpoint.config["vision_config"]
    assert model["type"] == "qwen3_vl"
    assert model["vocab_size"] == text["vocab_size"]
    assert model["context_length"] == text["max_position_embeddings"]
    assert model["image_token_id"] == checkpoint.config["image_token_id"]
    assert model["vision_start_token_id"] == checkpoint.config["vision_start_token_id"]
    layers = len(vision["deepstack_visual_indexes"])
    decoder = model["decoder"]
    assert decoder["hidden_size"] == (1 + layers) * text["hidden_size"]
    assert decoder["num_hidden_layers"] == text["num_hidden_layers"]
    assert decoder["num_key_value_heads"] == text["num_key_value_heads"]
    assert decoder["head_size"] == text["head_dim"]
    assert model["vision"]["patch_size"] == vision["patch_size"]
    assert model["vision"]["spatial_merge_size"] == vision["spatial_merge_size"]
    generation = json.loads((checkpoint.folder / "generation_config.json").read_text(encoding="utf-8"))
    eos = generation["eos_token_id"]
    assert model["eos_token_id"] == (eos if isinstance(eos, list) else [eos])


def test_max_length_is_limited_to_the_context(miniature: Path) -> None:
    checkpoint = open_checkpoint(miniature)
    assert genai_config(checkpoint, recipe(1000), fused=True)["search"]["max_length"] == 1000
    assert genai_config(checkpoint, recipe(10**6), fused=True)["search"]["max_length"] == checkpoint.text.max_position


def test_only_a_fused_decoder_shares_its_buffer(miniature: Path) -> None:
    checkpoint = open_checkpoint(miniature)
    assert genai_config(checkpoint, recipe(64), fused=True)["search"]["past_present_share_buffer"] is True
    assert genai_config(checkpoint, recipe(64), fused=False)["search"]["past_present_share_buffer"] is False


@pytest.mark.parametrize("shape", ["biased", "untied"])
@pytest.mark.parametrize(
    ("name", "providers"),
    [
        ("fp32", (None, None, None)),
        ("int4-fast", (None, None, None)),
        ("fp16", ("cuda", "cuda", "cuda")),
        ("int4-webgpu", ("webgpu", "webgpu", "webgpu")),
        # It has an operator to look up rows, but not quantized rows.
        ("fp16-dml", ("dml", "dml", "dml")),
        ("int4-dml", ("dml", None, "dml")),
    ],
)
def test_each_graph_uses_the_recipes_provider(
    checkpoint: Callable[[str], Path], shape: str, name: str, providers: tuple[str | None, ...]
) -> None:
    """A provider of None is the CPU, with as many threads as cores."""
    model = genai_config(open_checkpoint(checkpoint(shape)), load_recipe(name), fused=True)["model"]
    for graph, provider in zip(("decoder", "embedding", "vision"), providers, strict=True):
        options = model[graph]["session_options"]
        assert [list(entry) for entry in options["provider_options"]] == ([] if provider is None else [[provider]])
        assert options.get("intra_op_num_threads") == (0 if provider is None else None)


def test_padding_is_a_token_that_prompts_do_not_contain(miniature: Path) -> None:
    checkpoint = open_checkpoint(miniature)
    padding = genai_config(checkpoint, recipe(64), fused=True)["model"]["pad_token_id"]
    assert token_text(checkpoint, padding) == "<|video_pad|>"
    assert padding != checkpoint.generation["pad_token_id"]


@pytest.mark.parametrize("target", [GENAI, PLAIN], ids=lambda target: target.runtime)
def test_image_settings_come_from_the_checkpoint(target: Target, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c")
    size = {"shortest_edge": 5000, "longest_edge": 70000}
    edited(folder, "preprocessor_config.json", image_mean=[0.1, 0.2, 0], image_std=[1, 0.5, 0.25], size=size)
    text = PACKAGING[target.runtime].configs(open_checkpoint(folder), RECIPE, target)["vision_processor.json"]
    steps = [entry["operation"] for entry in json.loads(text)["processor"]["transforms"]]
    attributes = {step["name"]: step.get("attrs", {}) for step in steps}
    assert attributes["resize"]["min_pixels"] == 5000
    assert attributes["resize"]["max_pixels"] == 70000
    assert attributes["rescale"] == {"mean": [0.0, 0.0, 0.0], "std": [255.0, 255.0, 255.0]}
    assert attributes["normalize"] == {"mean": [0.1, 0.2, 0.0], "std": [1.0, 0.5, 0.25], "qwen3_vl": 1}
    # The runtime's parser distinguishes integers from floats by their notation.
    assert '"std": [\n              1.0,' in text


def test_only_the_plain_target_contains_the_pipeline(miniature: Path) -> None:
    checkpoint = open_checkpoint(miniature)
    plain = PACKAGING["onnxruntime"].configs(checkpoint, RECIPE, PLAIN)
    assert "import onnxruntime" in plain["pipeline.py"]
    assert "pipeline.py" not in PACKAGING["genai"].configs(checkpoint, RECIPE, GENAI)
