"""A new target is built, checked, packed, compared and run through its values in three tables."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from builder.bundle.check import check
from builder.bundle.diff.diff import diff
from builder.bundle.generate import answer
from builder.bundle.layout import data_files, graph_files
from builder.bundle.model_card import notes
from builder.bundle.pack import pack
from builder.checkpoint.load import open_checkpoint
from builder.checkpoint.parts import DECODER, EMBEDDINGS, VISION
from builder.reference.cases import SUITE
from builder.targets.graphs import GRAPHS, components
from builder.targets.recipe_file import load_recipe
from builder.targets.runners.registry import RUNTIMES, open_runner
from builder.util.errors import BuildError, BundleError, MissingPackageError, RecipeError, UnsafeError
from builder.verify.graphs.fp32_copy import write_fp32_copy
from builder.verify.graphs.sessions import Graphs
from builder.verify.whole import runtime_not_run
from tests.helpers import third_target
from tests.helpers.bundles import edit_manifest, relisted
from tests.helpers.checkpoints import MINIATURE
from tests.helpers.third_target import EXTRA, NAME, RUNTIME, prepare
from tests.helpers.toy_graphs import Toy, toy

IMAGES = SUITE / "images"
DECODER_FILE, DATA = "onnx/decoder_model_merged.onnx", "onnx/decoder_model_merged.onnx_data"


@pytest.fixture(scope="module")
def model() -> Toy:
    made = toy(open_checkpoint(MINIATURE), levels=3, seed=3)
    made.weights["embed"][:, made.checkpoint.text.hidden :] = 0  # as a lookup without merging pads its rows
    return made


@pytest.fixture(autouse=True)
def third(monkeypatch: pytest.MonkeyPatch) -> None:
    third_target.registered(monkeypatch)


@pytest.fixture(scope="module")
def made(model: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        third_target.registered(patch)
        return third_target.built(model, tmp_path_factory.mktemp("third"))


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made, tmp_path / NAME))


def test_graphs_and_data_are_linked_where_the_runtime_looks(made: Path) -> None:
    assert {path.name for path in (made / "onnx").iterdir()} == {
        "vision_encoder.onnx",
        "vision_encoder.onnx_data",
        "embed_tokens.onnx",
        "decoder_model_merged.onnx",
        "decoder_model_merged.onnx_data",
        "image_preprocessor.onnx",
    }
    filled = made.parents[1] / "quantize" / NAME
    assert (made / DATA).samefile(filled / "model.onnx.data")
    assert not list(made.glob("*.onnx"))
    assert data_files(made) == {(made / DATA).resolve(), (made / "onnx/vision_encoder.onnx_data").resolve()}


def test_the_manifest_has_the_role_of_each_graph(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    assert {name: facts["role"] for name, facts in manifest["graphs"].items()} == {
        "onnx/vision_encoder.onnx": VISION,
        "onnx/embed_tokens.onnx": EMBEDDINGS,
        DECODER_FILE: DECODER,
        "onnx/image_preprocessor.onnx": EXTRA,
    }
    extra = manifest["graphs"]["onnx/image_preprocessor.onnx"]
    assert (extra["opset"], extra["operators"], extra["inputs"][0]["dtype"]) == (17, ["Identity"], "uint8")
    assert [port["name"] for port in manifest["graphs"]["onnx/embed_tokens.onnx"]["inputs"]] == ["input_ids"]
    assert DATA in manifest["files"]
    assert graph_files(made)[DECODER] == made / DECODER_FILE


def test_check_pack_and_diff_pass(made: Path, tmp_path: Path) -> None:
    assert check(made).target == NAME
    packed, _ = pack(made, tmp_path / "one.tar")
    with tarfile.open(packed.path) as archive:
        assert any(name.endswith(f"/{DATA}") for name in archive.getnames())
        archive.extractall(tmp_path / "out", filter="data")
    (extracted,) = (tmp_path / "out").iterdir()
    assert check(extracted).target == NAME
    assert diff(made, extracted).equal
    assert "third ask ." in (made / "README.md").read_text()
    assert notes(NAME) == third_target.NOTES


@pytest.mark.parametrize("images", [[], ["sixteen.png"], ["wide.png", "tall.png"]], ids=str)
def test_tokens_equal_those_of_the_graphs(images: list[str], made: Path, model: Toy) -> None:
    paths = [IMAGES / name for name in images]
    result = answer(made, "What is it?", paths, max_new_tokens=8, on_text=lambda text: None)
    assert list(result.token_ids) == model.tokens(prepare(made, "What is it?", paths), 8)


def test_its_fp32_copy_has_the_same_layout(made: Path, tmp_path: Path) -> None:
    write_fp32_copy(made, tmp_path / "copy")
    assert (tmp_path / "copy" / DATA).samefile(made / DATA)
    assert Graphs.load(tmp_path / "copy", True, 16).merges is False


def flipped(folder: Path) -> None:
    content = bytearray((folder / DATA).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / DATA).write_bytes(content)


def moved_to(location: str) -> Callable[[Path], None]:
    """Change the decoder's data location to another existing file."""

    def change(folder: Path) -> None:
        graph = onnx.load(folder / DECODER_FILE, load_external_data=False)
        for tensor in graph.graph.initializer:
            for entry in tensor.external_data:
                entry.value = location if entry.key == "location" else entry.value
        onnx.save(graph, folder / DECODER_FILE)
        shutil.copyfile(folder / DATA, folder / "onnx" / location)
        relisted(folder, graphs=False)

    return change


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        (flipped, BundleError, DATA),
        (lambda folder: (folder / DATA).unlink(), BundleError, DATA),
        (lambda folder: (folder / DECODER_FILE).unlink(), BundleError, DECODER_FILE),
        (moved_to("../../x"), UnsafeError, DECODER_FILE),
        (moved_to("../shared.data"), UnsafeError, DECODER_FILE),
    ],
    ids=["tampered", "no data", "no graph", "outside", "another folder"],
)
def test_changes_in_the_subfolder_are_rejected(
    change: Callable[[Path], None], error: type[BuildError], name: str, bundle: Path
) -> None:
    change(bundle)
    with pytest.raises(error) as caught:
        check(bundle)
    assert name in f"{caught.value.what} {caught.value.found}"
    if error is UnsafeError:
        with pytest.raises(UnsafeError):
            answer(bundle, "What is it?", [], max_new_tokens=1, on_text=lambda text: None)


def test_two_graphs_with_the_same_role_are_rejected(bundle: Path) -> None:
    edit_manifest(bundle, lambda content: content["graphs"]["onnx/embed_tokens.onnx"].update(role=DECODER))
    with pytest.raises(BundleError, match="does not give each graph one role"):
        check(bundle)


def test_a_missing_runtime_is_not_run_and_reports_why(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    why = "Node.js is not installed"
    monkeypatch.setitem(RUNTIMES, NAME, replace(RUNTIME, missing=lambda: why))
    assert runtime_not_run(NAME, tasks=True) == {"tokens": why, "held-out accuracy": why}
    runner = open_runner(made, NAME)
    assert runner.not_run == why
    assert runner.prepare("What is it?", []).input_ids.size
    with pytest.raises(MissingPackageError) as caught:
        answer(made, "What is it?", [], max_new_tokens=1, on_text=lambda text: None)
    assert caught.value.found == why


def test_recipes_for_it_are_checked_against_its_settings(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('like = "fp32"\ntargets = ["third"]\n')
    (target,) = load_recipe(file).targets
    assert (target.runtime, target.attention) == (NAME, "eager")
    for line in ('attention = { third = "fused" }', 'attention = "fused"'):
        file.write_text(f'like = "fp32"\ntargets = ["third"]\n{line}\n')
        with pytest.raises(RecipeError, match="the target `third` does not support fused attention"):
            load_recipe(file)
    file.write_text('like = "int4"\ntargets = ["third"]\n')
    with pytest.raises(RecipeError, match="the target `third` does not support `rules`"):
        load_recipe(file)
    text = 'like = "bf16"\ntargets = ["third"]\nprovider = "cuda"\n'
    file.write_text(text)
    with pytest.raises(RecipeError, match="the target `third` is built in fp32 or fp16"):
        load_recipe(file)


@pytest.mark.parametrize("name", [*GRAPHS, NAME])
def test_a_targets_settings_match_its_ports(name: str) -> None:
    vision, embeddings, _ = components(open_checkpoint(MINIATURE), name)
    graphs = GRAPHS[name]
    assert vision.outputs[0].name == graphs.features
    assert graphs.merges == any(port.name == graphs.features for port in embeddings.inputs)
