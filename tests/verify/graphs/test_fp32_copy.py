"""Test copies of graphs: the same nodes on the same data files, in fp32 or with all logits."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import GraphProto, ModelProto, TensorProto

from builder.checkpoint.load import Checkpoint, open_checkpoint
from builder.checkpoint.parts import DECODER, EMBEDDINGS, VISION
from builder.quantization import activation_ranges
from builder.reference.cases import shipped_cases
from builder.targets.recipe import Target
from builder.targets.recipe_file import load_recipe
from builder.util.json_files import read_json
from builder.verify.graphs.all_logits import FloatSession
from builder.verify.graphs.fp32_copy import HALF, decoder_with_all_logits, in_fp32, write_fp32_copy
from builder.verify.graphs.sessions import Graphs
from builder.verify.report.gates import relative_error
from tests.conftest import Built
from tests.helpers.random_models import Array, drawn_input, positions

pytestmark = pytest.mark.torch

GRAPHS = (VISION, EMBEDDINGS, DECODER)
GENAI = (Target("genai", "fused"),)
# Its weights are exact in fp16, so that an fp32 copy computes the same as the fp32 bundle.
EXACT_IN_FP16 = "deepstack0"


def graph(folder: Path, name: str) -> ModelProto:
    model: ModelProto = onnx.load(folder / f"{name}.onnx", load_external_data=False)
    return model


def places(model: ModelProto) -> list[list[tuple[str, str]]]:
    """Return file, offset and length of every initializer in a data file."""
    external = [tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    return [[(entry.key, entry.value) for entry in tensor.external_data] for tensor in external]


def half_precision(inner: GraphProto) -> list[str]:
    """Return the values and constants in fp16 or bf16, including those of loop bodies, but not initializers."""
    values = [*inner.input, *inner.output, *inner.value_info]
    found = [value.name for value in values if value.type.tensor_type.elem_type in HALF]
    for node in inner.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += half_precision(attribute.g)
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in HALF:
                found.append(node.name)
    return found


@pytest.mark.parametrize("name", GRAPHS)
def test_the_copy_of_a_quantized_bundle_differs_only_in_its_accuracy_level(
    finished: Callable[[str], Path], name: str
) -> None:
    own, fp32_copy = graph(finished("int4"), name), in_fp32(graph(finished("int4"), name))
    levels = [x for node in own.graph.node for x in node.attribute if x.name == "accuracy_level"]
    assert ({level.i for level in levels} == {4}) == (name == DECODER)
    for level in levels:
        level.i = 1
    assert own == fp32_copy


def test_a_copy_links_all_data_files(finished: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = finished("int4")
    write_fp32_copy(bundle, tmp_path)
    files = {path.name for path in bundle.iterdir() if path.is_file()}
    assert {path.name for path in tmp_path.iterdir()} == files
    own = {name for name in files if not os.path.samefile(bundle / name, tmp_path / name)}
    assert own == {*(f"{name}.onnx" for name in GRAPHS), "genai_config.json"}
    for name in GRAPHS:
        assert places(graph(bundle, name)) == places(graph(tmp_path, name)) != []
        assert (tmp_path / f"{name}.onnx").stat().st_size <= (bundle / f"{name}.onnx").stat().st_size + 100


@pytest.fixture(scope="module")
def half(built: Built, checkpoint: Callable[[str], Path]) -> Path:
    """A bundle in fp16 for CUDA; its ranges are measured on one case."""
    with pytest.MonkeyPatch.context() as patch:
        few = tuple(case for case in shipped_cases() if case.name == "one image")
        patch.setattr(activation_ranges, "suite_cases", lambda checkpoint, folder: few)
        recipe = replace(load_recipe("fp16"), name="fp16-few")
        return built(checkpoint(EXACT_IN_FP16), recipe) / "genai"


@pytest.fixture
def fp32_copy(half: Path, tmp_path: Path) -> Path:
    write_fp32_copy(half, tmp_path)
    return tmp_path


def narrow(folder: Path, checkpoint: Checkpoint) -> Graphs:
    """Sessions of graphs in fp16, fed in fp32."""
    vision, embeddings, decoder = (
        FloatSession(onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"]))
        for name in GRAPHS
    )
    return Graphs(vision, embeddings, decoder, packed=True, hidden=checkpoint.text.hidden)


def computed(graphs: Graphs, checkpoint: Checkpoint) -> list[Array]:
    """Features of a film and images, inputs of the decoder, logits and caches."""
    given = next(one for one in (drawn_input(checkpoint, seed) for seed in range(9)) if len(one.image_grid_thw) > 1)
    main, levels = graphs.vision(given.pixel_values, given.image_grid_thw)
    embeds, inputs = graphs.embed(given.input_ids, main, levels, checkpoint.image_token_id)
    mask = np.ones_like(given.input_ids)
    logits, past = graphs.decode(embeds, inputs, positions(checkpoint, given), mask)
    return [main, embeds, logits, *past.values()]


def test_the_copy_of_an_fp16_bundle_has_fp16_only_in_storage(half: Path, fp32_copy: Path) -> None:
    assert any(half_precision(graph(half, name).graph) for name in GRAPHS)
    for name in GRAPHS:
        assert half_precision(graph(fp32_copy, name).graph) == []
        assert places(graph(half, name)) == places(graph(fp32_copy, name)) != []
    loops = [node for node in graph(fp32_copy, VISION).graph.node if node.op_type == "Loop"]
    assert loops  # otherwise their bodies are not tested


def test_the_copy_of_an_fp16_bundle_computes_in_fp32(
    half: Path, fp32_copy: Path, built: Built, checkpoint: Callable[[str], Path]
) -> None:
    """With weights that are exact in fp16; the shipped graph rounds at every node and differs."""
    opened = open_checkpoint(checkpoint(EXACT_IN_FP16))
    exact = built(checkpoint(EXACT_IN_FP16), replace(load_recipe("fp32"), targets=GENAI)) / "genai"
    want = computed(Graphs.load(exact, True, opened.text.hidden), opened)
    got = computed(Graphs.load(fp32_copy, True, opened.text.hidden), opened)
    shipped = computed(narrow(half, opened), opened)
    for mine, theirs in zip(got, want, strict=True):
        assert relative_error(mine, theirs) < 1e-3
    assert max(relative_error(mine, theirs) for mine, theirs in zip(shipped, want, strict=True)) > 3e-3


def test_the_settings_of_a_copy_are_for_the_cpu(half: Path, fp32_copy: Path) -> None:
    def providers(folder: Path) -> list[Any]:
        model = read_json(folder / "genai_config.json")["model"]
        return [model[part]["session_options"]["provider_options"] for part in ("vision", "embedding", "decoder")]

    assert all("cuda" in options[0] for options in providers(half))
    assert providers(fp32_copy) == [[], [], []]


def test_all_logits_equal_the_shipped_graphs_last_logits_at_every_token(finished: Callable[[str], Path]) -> None:
    folder = finished("int4")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    every = onnxruntime.InferenceSession(
        decoder_with_all_logits(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    shipped = onnxruntime.InferenceSession(folder / f"{DECODER}.onnx", providers=["CPUExecutionProvider"])
    seq, outputs = 7, [port.name for port in every.get_outputs()]
    layers = sum(name.endswith(".key") for name in outputs)

    def run(session: Any, count: int) -> list[Array]:
        shapes = {port.name: port.shape for port in session.get_inputs()}
        noise = np.random.default_rng(0).standard_normal((1, seq, shapes["inputs_embeds"][2]), np.float32)
        feed = {
            name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items() if "past" in name
        }
        feed["inputs_embeds"] = noise[:, :count]
        feed["attention_mask"] = np.ones((1, count), np.int64)
        feed["position_ids"] = np.broadcast_to(np.arange(count), (3, 1, count)).copy()
        found: list[Array] = session.run(None, feed)
        return found

    logits, *rest = run(every, seq)
    assert logits.shape == (1, seq, shipped.get_outputs()[0].shape[2])
    streams = rest[-layers:]
    assert outputs[-layers:] == [f"residual.{n}" for n in range(layers)]
    assert all(stream.shape[:2] == (1, seq) for stream in streams)
    for count in range(1, seq + 1):
        (last, *_) = run(shipped, count)
        np.testing.assert_allclose(logits[:, count - 1 : count], last, atol=1e-4 * float(logits.std()))
