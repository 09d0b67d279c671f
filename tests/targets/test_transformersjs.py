"""The target `transformersjs` without torch and Node.js: files, settings, and requests to a program."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from builder.checkpoint.load import open_checkpoint
from builder.checkpoint.parts import DECODER, EMBEDDINGS, VISION
from builder.graph.ports import packed_width
from builder.quantization.rules import Rule
from builder.reference.cases import SUITE
from builder.targets.graphs import GRAPHS, components
from builder.targets.recipe import Recipe
from builder.targets.recipe_file import load_recipe
from builder.targets.runners import node
from builder.targets.runners.node import PROGRAMS, Program
from builder.targets.runners.transformersjs import TransformersJs
from builder.targets.transformersjs import NAME, PACKAGING, VERSION, config, dtype, layout, preprocessor_config
from tests.helpers.checkpoints import MINIATURE, SHAPES
from tests.helpers.processes import ROOT

IMAGES = SUITE / "images"
WRITTEN = 'like = "{like}"\ntargets = ["transformersjs"]\nprovider = "cpu"\n'


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], Recipe]:
    """`recipe(like)`: the shipped recipe, for this target."""

    def load(like: str) -> Recipe:
        file = tmp_path / f"{like}-js.toml"
        file.write_text(WRITTEN.format(like=like))
        return load_recipe(file)

    return load


@pytest.mark.parametrize(
    ("like", "word", "file"),
    [
        ("fp32", "fp32", "onnx/decoder_model_merged.onnx"),
        ("fp16", "fp16", "onnx/decoder_model_merged_fp16.onnx"),
        ("int8", "q8", "onnx/decoder_model_merged_quantized.onnx"),
        ("int4", "q4", "onnx/decoder_model_merged_q4.onnx"),
        ("int4-webgpu", "q4f16", "onnx/decoder_model_merged_q4f16.onnx"),
    ],
)
def test_file_names_have_the_librarys_suffix(recipe: Callable[[str], Recipe], like: str, word: str, file: str) -> None:
    loaded = recipe(like)
    assert dtype(loaded) == word
    assert (layout(DECODER, loaded).graph, layout(DECODER, loaded).data) == (file, f"{file}_data")
    # A graph outside of the model has no suffix.
    assert layout("image_preprocessor", loaded).graph == "onnx/image_preprocessor.onnx"


def test_kept_matrices_do_not_change_the_dtype() -> None:
    kept = replace(load_recipe("fp32"), rules=(Rule(("*",), "keep"),))
    assert dtype(kept) == "fp32"


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_ports_have_the_librarys_names(checkpoint: Callable[[str], Path], shape: str) -> None:
    read = open_checkpoint(checkpoint(shape))
    vision, embeddings, decoder = components(read, NAME)
    width = packed_width(read)
    assert [(port.name, port.shape) for port in embeddings.inputs] == [("input_ids", ("batch_size", "seq"))]
    assert embeddings.outputs[0].shape == ("batch_size", "seq", width)
    assert [(port.name, port.shape) for port in vision.outputs] == [("image_features", ("tokens", width))]
    cache = [port for port in decoder.inputs if port.name.startswith("past_key_values.")]
    assert {port.shape for port in cache} == {("batch_size", read.text.kv_heads, "past", read.text.head_dim)}
    assert {"inputs_embeds", "image_features"} <= GRAPHS[NAME].wide_ports


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_config_has_what_the_library_reads(checkpoint: Callable[[str], Path], shape: str) -> None:
    read = open_checkpoint(checkpoint(shape))
    found = config(read, replace(load_recipe("fp32"), targets=()))
    assert found["architectures"] == ["Qwen3VLForConditionalGeneration"]
    assert found["model_type"] == "qwen3_vl"
    text = found["text_config"]
    assert text["model_type"] == "qwen3_vl_text"
    facts = read.text.layers, read.text.heads, read.text.kv_heads, read.text.head_dim
    keys = "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"
    assert tuple(text[key] for key in keys) == facts
    assert found["vision_config"]["spatial_merge_size"] == read.vision.merge_size
    assert found["image_token_id"] == read.image_token_id
    own = found["transformers.js_config"]
    assert own["dtype"] == "fp32"
    assert own["use_external_data_format"] == {"vision_encoder": 1, "embed_tokens": 1, "decoder_model_merged": 1}


def test_the_processors_settings_are_written_out() -> None:
    found = preprocessor_config(open_checkpoint(MINIATURE))
    given = json.loads((MINIATURE / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert {key: found[key] for key in ("size", "patch_size", "merge_size", "image_mean", "image_std")} == {
        key: given[key] for key in ("size", "patch_size", "merge_size", "image_mean", "image_std")
    }
    assert (found["do_normalize"], found["do_resize"], found["resample"]) == (True, True, 3)
    assert (found["processor_class"], found["image_processor_type"]) == ("Qwen3VLProcessor", "Qwen2VLImageProcessor")


def test_the_demo_uses_the_pinned_library(recipe: Callable[[str], Recipe]) -> None:
    loaded = recipe("fp32")
    files = PACKAGING.configs(open_checkpoint(MINIATURE), loaded, loaded.targets[0])
    demo = {name: text for name, text in files.items() if name.startswith("demo/")}
    assert set(demo) == {"demo/index.html", "demo/demo.css", "demo/demo.mjs", "demo/worker.mjs"}
    assert not any(VERSION in text for text in demo.values())
    assert all(node.PINNED_LIBRARY in demo[name] for name in ("demo/index.html", "demo/worker.mjs"))


def test_the_readme_names_the_pinned_library() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count(f"npm install {node.LIBRARY}@{node.PINNED_LIBRARY}") == 2


def test_the_lock_file_names_no_host_and_matches_the_package() -> None:
    lock = json.loads((PROGRAMS / "package-lock.json").read_text(encoding="utf-8"))
    assert lock["packages"][""]["dependencies"] == node.PINNED["dependencies"]
    locked = lock["packages"]
    assert locked[f"node_modules/{node.LIBRARY}"]["version"] == node.PINNED_LIBRARY
    assert not any("resolved" in facts for facts in locked.values())
    assert all("integrity" in facts for name, facts in locked.items() if name)


@pytest.fixture
def fake_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`fake_node(program)`: a file with a Python program, which a command named `node` runs."""
    command = tmp_path / "bin" / "node"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo v22.1.0 && exit\nexec "{sys.executable}" "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=":")
    node._version_of.cache_clear()

    def write(program: str) -> Path:
        file = tmp_path / "program.py"
        file.write_text(program)
        return file

    return write


ANSWERING = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["action"] == "die":
        sys.exit("it hurts")
    if request["action"] == "fail":
        print(json.dumps({"end": True, "error": "no such graph"}), flush=True)
        continue
    for token in range(request["most"]):
        print(json.dumps({"token": token}), flush=True)
    print(json.dumps({"end": True}), flush=True)
"""


def test_a_program_responds_line_by_line_to_several_requests(fake_node: Callable[[str], Path]) -> None:
    program = Program(fake_node(ANSWERING))
    for count in (3, 0, 2):
        assert [response["token"] for response in program.request("count", most=count)] == list(range(count))
    program.close()


def test_errors_of_a_program_are_reported(fake_node: Callable[[str], Path]) -> None:
    program = Program(fake_node(ANSWERING))
    with pytest.raises(RuntimeError, match="no such graph"):
        list(program.request("fail"))
    assert len(list(program.request("count", most=1))) == 1
    with pytest.raises(RuntimeError, match="ended with 1: it hurts"):
        list(program.request("die"))
    assert len(list(program.request("count", most=1))) == 1
    program.close()


def test_an_unfinished_response_ends_the_program(fake_node: Callable[[str], Path]) -> None:
    program = Program(fake_node(ANSWERING))
    response = program.request("count", most=5)
    assert next(response) == {"token": 0}
    process = program._process
    assert process is not None
    response.close()  # type: ignore[attr-defined]
    assert process.returncode is not None
    assert [response["token"] for response in program.request("count", most=1)] == [0]
    program.close()


ECHOING = """
import json, struct, sys
for line in sys.stdin:
    request = json.loads(line)
    tokens = [*request["ids"][:2], request["most"], request["least"], *request["stop"]]
    if request["pixels"]:
        data = open(request["pixels"]["path"], "rb").read()
        rows, columns = request["pixels"]["dims"]
        tokens += [len(data) == 4 * rows * columns, *request["grid"][0]]
    for token in tokens:
        print(json.dumps({"token": int(token)}), flush=True)
    print(json.dumps({"end": True}), flush=True)
"""


def bundle(folder: Path, recipe: Recipe) -> Path:
    """A bundle with only the files that a runner reads."""
    read = open_checkpoint(MINIATURE)
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((MINIATURE / "tokenizer.json").read_bytes())
    for name, text in PACKAGING.configs(read, recipe, recipe.targets[0]).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_a_runner_passes_exact_inputs(
    fake_node: Callable[[str], Path], recipe: Callable[[str], Recipe], tmp_path: Path
) -> None:
    runner = TransformersJs(bundle(tmp_path / "bundle", recipe("fp32")))
    runner.program = Program(fake_node(ECHOING))
    image = MINIATURE.parent / "heldout" / "pic002.png"
    stop = list(runner.settings.eos_token_ids)
    inputs = runner.prepare("What is this?", [])
    assert list(runner.tokens(inputs, 9, 4)) == [*inputs.input_ids[0, :2], 9, 4, *stop]
    inputs = runner.prepare("What is this?", [image])
    assert inputs.image_grid_thw is not None
    assert list(runner.tokens(inputs, 9)) == [*inputs.input_ids[0, :2], 9, 0, *stop, 1, *inputs.image_grid_thw[0]]
    runner.program.close()
    assert runner.not_run is None
    assert runner.own.most_images == 1
    assert not runner.at_target_size(image)
    assert runner.at_target_size(IMAGES / "plain.png")


def test_missing_packages_are_reported_with_the_next_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(node.PACKAGES, str(tmp_path))
    monkeypatch.setattr(node, "node_version", lambda: None)
    assert "Node.js is not installed" in str(node.missing())
    monkeypatch.setattr(node, "node_version", lambda: "18.19.0")
    assert f"18.19.0 is too old; install version {node.OLDEST}" in str(node.missing())
    monkeypatch.setattr(node, "node_version", lambda: "22.1.0")
    assert "`make node`" in str(node.missing())
    package = tmp_path / "node_modules" / node.LIBRARY / "package.json"
    package.parent.mkdir(parents=True)
    package.write_text('{"version": "4.2.9"}')
    assert "4.2.9" in str(node.missing())
    assert node.versions() == {}
    package.write_text(json.dumps({"version": node.PINNED_LIBRARY}))
    assert node.missing() is None
    assert node.versions() == {node.LIBRARY: node.PINNED_LIBRARY, "Node.js": "22.1.0"}


def test_each_graph_has_its_own_data() -> None:
    assert GRAPHS[NAME].own_data
    assert {VISION, EMBEDDINGS, DECODER} == {
        component.name for component in components(open_checkpoint(MINIATURE), NAME)
    }
