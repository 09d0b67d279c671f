"""Checkpoints of every supported form are opened and read correctly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from builder.checkpoint.load import expected_tensors, open_checkpoint
from builder.util.errors import CheckpointError, WeightError
from tests.helpers.checkpoints import SHAPES, write_checkpoint
from tests.helpers.edits import Change, config, edit_json, remove, tie_head, write

NORM = "model.language_model.norm.weight"
Q_PROJ = "model.language_model.layers.0.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"
FIRST, LAST = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_opens_with_its_architecture(checkpoint: Callable[[str], Path], shape: str) -> None:
    folder = checkpoint(shape)
    opened = open_checkpoint(folder)
    arguments = SHAPES[shape]
    assert opened.text.tied is arguments.get("tied", True)
    assert opened.text.rope_type == arguments.get("rope", {}).get("rope_type", "default")
    assert opened.vision.deepstack == arguments["deepstack"]
    assert list(opened.tensors) == list(expected_tensors(opened.config, opened.text, opened.vision))
    assert set(opened.files) <= {path.name for path in folder.iterdir()}


def test_architecture_of_the_miniature(miniature: Path) -> None:
    opened = open_checkpoint(miniature, name="miniature", revision="1" * 40)
    assert (opened.name, opened.revision) == ("miniature", "1" * 40)
    assert (opened.text.hidden, opened.text.heads, opened.text.kv_heads, opened.text.head_dim) == (
        160,
        4,
        2,
        32,
    )
    assert (opened.vision.depth, opened.vision.out_hidden, opened.vision.deepstack) == (5, 160, (1, 2, 3))
    assert (opened.image_token_id, opened.video_token_id) == (4068, 4069)
    assert (opened.vision_start_token_id, opened.vision_end_token_id) == (4065, 4066)
    assert opened.generation["eos_token_id"] == [4058, 4056]
    assert opened.preprocessor["size"] == {"longest_edge": 131072, "shortest_edge": 4096}
    assert "config.json" in opened.files
    assert opened.chat_template == (miniature / "chat_template.jinja").read_text()


def test_importing_and_opening_needs_no_torch(miniature: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import builder.stages.fetch;"
        "builder.stages.fetch.open_checkpoint(Path(sys.argv[1]));"
        "print([name for name in ('torch', 'transformers', 'onnx') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(miniature)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("shape", ["untied", "deepstack0", "patch14merge3"])
def test_read_gives_the_stored_values_without_copying(checkpoint: Callable[[str], Path], shape: str) -> None:
    opened = open_checkpoint(checkpoint(shape))
    types = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
    for file in {tensor.file for tensor in opened.tensors.values()}:
        for name, stored in load_file(opened.folder / file).items():
            weight = opened.read(name)
            assert weight.dtype == stored.dtype == types[opened.tensors[name].dtype]
            assert weight.shape == stored.shape == opened.tensors[name].shape
            assert weight.tobytes() == stored.tobytes()
            assert not weight.flags.writeable
            assert isinstance(weight, np.memmap)


def test_read_names_the_nearest_weight(miniature: Path) -> None:
    with pytest.raises(WeightError, match=r"language_model\.norm\.weight"):
        open_checkpoint(miniature).read("model.language.norm.weight")


def reverse(content: dict[str, Any]) -> None:
    for key in reversed(list(content)):
        content[key] = content.pop(key)


def digest_after(folder: Path, change: Change) -> str:
    change(folder)
    return open_checkpoint(folder).config_digest


def test_config_digest_is_of_the_architecture(single: Path) -> None:
    first = open_checkpoint(single).config_digest
    history = config(transformers_version="9", text__dtype="float16", _name_or_path="x")
    assert digest_after(single, history) == first
    assert digest_after(single, edit_json("config.json", reverse)) == first
    assert digest_after(single, config(rope__factor=3.0)) != first


def move_to_processor_config(folder: Path) -> None:
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))


def say_min_pixels(content: dict[str, Any]) -> None:
    content |= {"min_pixels": content["size"]["shortest_edge"], "max_pixels": content["size"]["longest_edge"]}
    del content["size"]


@pytest.mark.parametrize("change", [move_to_processor_config, edit_json("preprocessor_config.json", say_min_pixels)])
def test_image_settings_of_other_releases_are_the_same(sharded: Path, change: Change) -> None:
    before = open_checkpoint(sharded).preprocessor
    change(sharded)
    assert open_checkpoint(sharded).preprocessor == before


def test_chat_template_is_where_transformers_looks_first(sharded: Path) -> None:
    edit_json("tokenizer_config.json", lambda content: content.update(chat_template="third"))(sharded)
    write("chat_template.json", b'{"chat_template": "second"}')(sharded)
    write("chat_template.jinja", b"first")(sharded)
    templates = []
    for file in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        templates.append(open_checkpoint(sharded).chat_template)
        (sharded / file).unlink()
    assert templates == ["first", "second", "third"]
    with pytest.raises(CheckpointError, match="has no chat template"):
        _ = open_checkpoint(sharded).chat_template


def say_rope_as_transformers_4(content: dict[str, Any]) -> None:
    text = content["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    text["rope_scaling"] = rope


def link_into_a_cache(folder: Path) -> None:
    blobs = folder.with_name("blobs")
    folder.rename(blobs)
    folder.mkdir()
    for number, path in enumerate(sorted(blobs.iterdir())):
        blob = path.rename(blobs / str(number))
        (folder / path.name).symlink_to(os.path.relpath(blob, folder))


@pytest.mark.parametrize(
    "change",
    [
        tie_head(lambda embeddings: embeddings),
        edit_json("config.json", say_rope_as_transformers_4),
        link_into_a_cache,
        write("pytorch_model.bin"),
        remove("generation_config.json"),
        config(dtype="float32"),
        edit_json("config.json", lambda content: content.pop("dtype")),
        edit_json("config.json", lambda content: content["vision_config"].pop("in_channels")),
    ],
)
def test_harmless_variations_open(single: Path, change: Change) -> None:
    before = open_checkpoint(single)
    change(single)
    after = open_checkpoint(single)
    assert (after.text, after.vision) == (before.text, before.vision)
    assert list(after.tensors) == list(before.tensors)


def test_kv_heads_default_to_heads(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", text={"num_key_value_heads": 4})
    config(text__num_key_value_heads=None)(folder)
    assert open_checkpoint(folder).text.kv_heads == 4


# Upstream


@pytest.mark.torch
@pytest.mark.parametrize("shape", SHAPES)
def test_names_and_shapes_are_upstreams(checkpoint: Callable[[str], Path], shape: str) -> None:
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    opened = open_checkpoint(checkpoint(shape))
    loaded: Any = Qwen3VLForConditionalGeneration.from_pretrained(
        opened.folder, dtype=torch.float32, output_loading_info=True
    )
    model, info = loaded
    assert {kind: list(names) for kind, names in info.items() if names} == {}
    parameters = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert parameters == expected_tensors(opened.config, opened.text, opened.vision)
    for name, value in model.named_parameters():
        assert np.array_equal(value.detach().numpy(), opened.read(name).astype(np.float32))
    assert model.config.text_config.rope_parameters["rope_type"] == opened.text.rope_type
