"""Lossy shipped recipes build, pass verification and do what their comments say."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from builder.checkpoint.load import open_checkpoint
from builder.checkpoint.parts import DECODER, EMBEDDINGS, VISION
from builder.reference.cases import whole_suite
from builder.reference.model import Reference
from builder.targets.recipe_file import load_recipe, shipped
from builder.targets.runners.genai import GenaiBundle
from builder.util.files import sha256
from builder.util.json_files import read_json
from builder.verify.graphs.sessions import Graphs
from builder.verify.quality import quality_gates
from tests.conftest import Built
from tests.helpers.checkpoints import MINIATURE

pytestmark = pytest.mark.torch

# Recipes for openvino are in tests/targets/runners/test_openvino.py.
LOSSY = [name for name in shipped() if not load_recipe(name).exact and load_recipe(name).targets[0].runtime == "genai"]
IN_SECONDS = {"int4"}  # the others take minutes
HEAD = ("levels", "scales")
Place = tuple[str, int, int]
MAPS = Path("/proc/self/maps")


def recipes() -> list[Any]:
    return [pytest.param(name, marks=() if name in IN_SECONDS else pytest.mark.slow) for name in LOSSY]


def parity(bundle: Path) -> Mapping[str, Any]:
    return read_json(bundle / "evidence" / "parity.json")


@pytest.mark.parametrize("name", recipes())
def test_the_miniature_is_built_and_verified(finished: Callable[[str], Path], name: str) -> None:
    recipe, bundle = load_recipe(name), finished(name)
    evidence, manifest = parity(bundle), read_json(bundle / "manifest.json")
    assert evidence["verdict"] == ("passed" if recipe.provider == "cpu" else "partial")
    assert manifest["recipe"]["name"] == name
    assert manifest["recipe"]["limits"] == vars(recipe.limits)
    not_run = json.dumps(evidence["not run"])
    assert (f"the provider {recipe.provider}" in not_run) == (recipe.provider != "cpu")

    model = read_json(bundle / "genai_config.json")["model"]
    for part in ("vision", "decoder"):
        options = model[part]["session_options"]["provider_options"]
        assert [list(entry) for entry in options] == ([] if recipe.provider == "cpu" else [[recipe.provider]])
    if recipe.provider == "cpu":
        answers(bundle)
    elif recipe.precision != "bf16":  # the CPU has no MatMul of that type
        for graph in (VISION, EMBEDDINGS, DECODER):
            onnxruntime.InferenceSession(bundle / f"{graph}.onnx", providers=["CPUExecutionProvider"])


def answers(bundle: Path) -> None:
    """Run the bundle in stock onnxruntime-genai, with its own processor."""
    runner = GenaiBundle(bundle)
    image = MINIATURE.parent / "heldout" / "pic002.png"
    tensors, inputs = runner.runtime_inputs("Read the number.", [image])
    tokens = list(runner.tokens_of(tensors, inputs.input_ids.shape[1], 8))
    assert runner.text(tokens).strip()


def placed(bundle: Path, graph: str) -> dict[str, Place]:
    """Return {initializer: (file, offset, length)} of a graph's external data."""
    model = onnx.load(bundle / f"{graph}.onnx", load_external_data=False)
    places = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            places[tensor.name] = entries["location"], int(entries["offset"]), int(entries["length"])
    return places


def test_the_tied_matrix_is_stored_once(finished: Callable[[str], Path]) -> None:
    bundle = finished("int4")
    rows, head = placed(bundle, EMBEDDINGS), placed(bundle, DECODER)
    for part in HEAD:
        assert rows[f"embed_tokens.weight.{part}"] == head[f"lm_head.weight.{part}"]
        file, offset, length = head[f"lm_head.weight.{part}"]
        content = (bundle / file).read_bytes()[offset : offset + length]
        assert sum(path.read_bytes().count(content) for path in bundle.iterdir() if path.is_file()) == 1
    # The data files contain only referenced tensors, once, and padding for alignment.
    places = {place for graph in (VISION, EMBEDDINGS, DECODER) for place in placed(bundle, graph).values()}
    for data in bundle.glob("*.data"):
        used = sum(length for file, _, length in places if file == data.name)
        assert used <= data.stat().st_size < used + 4096 * len(places)


def test_both_graphs_read_the_tied_matrix(lossy: Callable[[str], Path]) -> None:
    """Changing its bytes changes both the looked-up row and the logits."""
    folder = lossy("int4")
    opened = open_checkpoint(MINIATURE)
    token = 100
    before = looked_up_and_multiplied(folder, token, opened.text.hidden)
    file, offset, length = placed(folder, DECODER)["lm_head.weight.levels"]
    content = bytearray((folder / file).read_bytes())
    row = length // opened.text.vocab
    begin = offset + token * row
    content[begin : begin + row] = bytes(255 - value for value in content[begin : begin + row])
    (folder / file).unlink()  # it is a link
    (folder / file).write_bytes(content)
    after = looked_up_and_multiplied(folder, token, opened.text.hidden)
    for then, now in zip(before, after, strict=True):
        changed = np.flatnonzero((then != now).reshape(len(then), -1).any(1))
        assert changed.tolist() == [token]


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux lists mapped files")
def test_the_runtime_maps_the_tied_matrix_from_its_file(lossy: Callable[[str], Path]) -> None:
    """Both sessions map its pages from the file, except for the MatMul's codes, which are repacked on loading."""
    folder, found = lossy("int4"), {}
    for graph, name in ((EMBEDDINGS, "embed_tokens"), (DECODER, "lm_head")):
        session = onnxruntime.InferenceSession(folder / f"{graph}.onnx", providers=["CPUExecutionProvider"])
        places = {part: placed(folder, graph)[f"{name}.weight.{part}"] for part in HEAD}
        found[graph] = {part for part, place in places.items() if mapped(folder, *place)}
        del session
    assert found == {EMBEDDINGS: {"levels", "scales"}, DECODER: {"scales"}}


def mapped(folder: Path, file: str, offset: int, length: int) -> bool:
    """Return whether a part of a file is mapped into this process."""
    for line in MAPS.read_text().splitlines():
        span, _, at, *_, path = line.split(maxsplit=5)
        begin, end = (int(side, 16) for side in span.split("-"))
        first = int(at, 16)
        if path == str(folder / file) and first <= offset and offset + length <= first + end - begin:
            return True
    return False


def looked_up_and_multiplied(folder: Path, token: int, hidden: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all rows of the embeddings, [vocab, H], and the logits of a fixed input, [vocab, 1]."""
    graphs = Graphs.load(folder, True, hidden)
    (port,) = [port for port in graphs.model.get_inputs() if port.name == "inputs_embeds"]
    deepstack = [np.zeros((0, hidden), np.float32)] * (port.shape[2] // hidden - 1)
    opened = open_checkpoint(MINIATURE)
    ids = np.arange(opened.text.vocab, dtype=np.int64)[None]
    rows, _ = graphs.embed(ids, deepstack[0], deepstack, opened.image_token_id)
    noise = np.random.default_rng(token).standard_normal((1, 3, hidden), np.float32)
    zeros = [np.zeros_like(noise)] * len(deepstack)
    positions = np.broadcast_to(np.arange(3), (3, 1, 3)).copy()
    logits, _ = graphs.decode(noise, zeros, positions, np.ones((1, 3), np.int64))
    return rows[0], logits[0, -1][:, None]


def test_a_bundle_matches_its_manifest(finished: Callable[[str], Path]) -> None:
    bundle = finished("int4")
    for name, facts in read_json(bundle / "manifest.json")["files"].items():
        assert sha256(bundle / name) == facts["sha256"]


def kl(folder: Path, reference: Reference, images: Path) -> float:
    """Return the mean KL divergence over all positions of the suite."""
    limits = load_recipe("int4").limits
    assert limits is not None
    suite = whole_suite(reference.checkpoint, images)
    _, facts = quality_gates(folder, "genai", reference, limits, suite)
    return float(facts["positions"]["kl mean"])


@pytest.mark.slow
def test_calibrated_int4_is_much_more_accurate_than_rounding(
    finished: Callable[[str], Path], built: Built, reference: Reference, tmp_path: Path
) -> None:
    """At the same size: the same blocks without a search."""
    recipe = load_recipe("int4")
    rules = tuple(replace(rule, search="none") for rule in recipe.rules)
    rounded = built(MINIATURE, replace(recipe, name="int4-rounded", rules=rules)) / "genai"
    sizes = [sum(path.stat().st_size for path in folder.glob("*.data")) for folder in (finished("int4"), rounded)]
    assert sizes[0] == sizes[1]
    calibrated = parity(finished("int4"))["facts"]["quality"]["positions"]["kl mean"]
    assert calibrated <= 0.6 * kl(rounded, reference, tmp_path)


@pytest.mark.slow
def test_int8_answers_as_fp32_does(finished: Callable[[str], Path]) -> None:
    quality = parity(finished("int8"))["facts"]["quality"]
    assert quality["positions"]["same top-1"] >= 0.995
    assert quality["task"]["lost"] == 0


@pytest.mark.slow
def test_recipes_are_ordered_by_size(finished: Callable[[str], Path]) -> None:
    def weights(name: str) -> int:
        return sum(path.stat().st_size for path in finished(name).glob("*.data"))

    steps = [weights(name) for name in ("fp16", "int8", "int4", "int4-fast", "int4-small")]
    assert steps == sorted(set(steps), reverse=True)
