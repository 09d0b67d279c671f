"""quantize: the filled graph holds the checkpoint's numbers, equal data is one file, every tensor is used."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from safetensors.numpy import save_file

from builder import quantize
from builder.checkpoint import Checkpoint, open_checkpoint
from builder.contract import components
from builder.errors import WeightError
from builder.files import sha256
from builder.graph import Binding, BoundGraph, bind, save
from builder.recipe import Recipe, Target
from builder.safetensors_index import index_tensors
from builder.source import parse_source
from builder.stage import Build
from builder.weights import DataFile
from tests.small_graphs import Array, drawn

TENSORS = {
    "plain": drawn(3, 5).astype(np.float16),
    "turned": drawn(3, 5, seed=1).astype(ml_dtypes.bfloat16),
    "conv": drawn(4, 3, 2, 2, 2).astype(ml_dtypes.bfloat16),
    "scalar": np.array(1.5, np.float32),
}
BINDINGS = (
    Binding("a", "plain", "float32", (3, 5)),
    Binding("b", "turned", "float32", (3, 5), transpose=True),
    Binding("c", "conv", "float32", (4, 24)),
    Binding("d", "scalar", "float32", ()),
)
BOTH = Recipe("both", "fp32", (Target("genai", "fused"), Target("onnxruntime", "eager")), 128)


@pytest.fixture
def source(tmp_path: Path, miniature: Path) -> Checkpoint:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file(dict(TENSORS), folder / "model.safetensors")
    tensors = index_tensors(folder, ["model.safetensors"])
    return replace(open_checkpoint(miniature), folder=folder, tensors=tensors)


def weights_as_outputs(bindings: Sequence[Binding]) -> BoundGraph:
    """A graph of no inputs that hands out each of its initializers."""
    weights = [
        ir.Value(name=one.initializer, shape=ir.Shape(one.stored_shape), type=ir.TensorType(ir.DataType.FLOAT))
        for one in bindings
    ]
    nodes = [ir.node("Identity", [weight], name=f"copy_{weight.name}") for weight in weights]
    for node, weight in zip(nodes, weights, strict=True):
        output = node.outputs[0]
        output.name, output.shape, output.type = f"{weight.name}_out", weight.shape, weight.type
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([], outputs, nodes=nodes, initializers=weights, opset_imports={"": 18}, name="weights")
    return bind(ir.Model(graph, ir_version=10), bindings)


def read_back(path: Path) -> dict[str, Array]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {}), strict=True))


def test_onnxruntime_reads_the_checkpoints_numbers(source: Checkpoint, tmp_path: Path) -> None:
    data = quantize.fill(weights_as_outputs(BINDINGS), source, tmp_path / "out" / "model.onnx", {})
    got = read_back(tmp_path / "out" / "model.onnx")
    want = {
        "a_out": TENSORS["plain"],
        "b_out": TENSORS["turned"].T,
        "c_out": TENSORS["conv"].reshape(4, 24),
        "d_out": TENSORS["scalar"],
    }
    assert set(got) == set(want)
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array.astype(np.float32))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.onnx", "model.onnx.data"}
    assert data.sha256 == sha256(tmp_path / "out" / "model.onnx.data")


def test_the_pair_runs_from_wherever_it_is_moved_to(source: Checkpoint, tmp_path: Path) -> None:
    quantize.fill(weights_as_outputs(BINDINGS), source, tmp_path / "here" / "model.onnx", {})
    before = read_back(tmp_path / "here" / "model.onnx")
    os.rename(tmp_path / "here", tmp_path / "there")
    assert str(tmp_path).encode() not in (tmp_path / "there" / "model.onnx").read_bytes()
    after = read_back(tmp_path / "there" / "model.onnx")
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_equal_data_of_two_graphs_is_one_file(source: Checkpoint, tmp_path: Path) -> None:
    """Initializers may be called differently, as long as their order is the same."""
    written: dict[str, tuple[Path, DataFile]] = {}
    renamed = [replace(binding, initializer=f"model.{binding.initializer}") for binding in BINDINGS]
    first = quantize.fill(weights_as_outputs(BINDINGS), source, tmp_path / "genai" / "model.onnx", written)
    second = quantize.fill(weights_as_outputs(renamed), source, tmp_path / "onnxruntime" / "model.onnx", written)
    one, two = (tmp_path / runtime / "model.onnx.data" for runtime in ("genai", "onnxruntime"))
    assert os.path.samefile(one, two)
    assert (first.sha256, first.size) == (second.sha256, second.size)
    got = read_back(tmp_path / "onnxruntime" / "model.onnx")
    for name, array in read_back(tmp_path / "genai" / "model.onnx").items():
        np.testing.assert_array_equal(got[f"model.{name}"], array)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(replace(BINDINGS[0], transpose=True), id="transposed"),
        pytest.param(replace(BINDINGS[0], tensor="turned"), id="another tensor"),
        pytest.param(replace(BINDINGS[0], initializer="z"), id="another order"),
    ],
)
def test_other_data_is_a_file_of_its_own(source: Checkpoint, tmp_path: Path, changed: Binding) -> None:
    written: dict[str, tuple[Path, DataFile]] = {}
    quantize.fill(weights_as_outputs(BINDINGS), source, tmp_path / "one.onnx", written)
    quantize.fill(weights_as_outputs((changed, *BINDINGS[1:])), source, tmp_path / "two.onnx", written)
    assert not os.path.samefile(tmp_path / "one.onnx.data", tmp_path / "two.onnx.data")
    want = TENSORS[changed.tensor].astype(np.float32)
    got = read_back(tmp_path / "two.onnx")[f"{changed.initializer}_out"]
    np.testing.assert_array_equal(got, want.T if changed.transpose else want)


@pytest.fixture
def build(checkpoint: Callable[[str], Path], tmp_path: Path) -> Build:
    """Untied, in two shards; `optimize` has left graphs that share out every tensor, the same ones a target."""
    opened = open_checkpoint(checkpoint("untied"))
    prepared = Build(parse_source(str(opened.folder)), BOTH, tmp_path / "out")
    prepared.__dict__["checkpoint"] = opened  # what the stage `fetch` would have made
    for target in BOTH.targets:
        share_out(prepared, target.runtime, list(opened.tensors))
    return prepared


def share_out(build: Build, runtime: str, tensors: Sequence[str]) -> None:
    parts = components(build.checkpoint, runtime)
    for index, component in enumerate(parts):
        names = tensors[index :: len(parts)]
        bindings = [Binding(name, name, "float32", build.checkpoint.tensors[name].shape) for name in names]
        save(weights_as_outputs(bindings), build.folder("optimize") / runtime / component.file)


def test_the_stage_writes_every_tensor_once_for_all_targets(build: Build, tmp_path: Path) -> None:
    out = tmp_path / "part"
    facts = quantize.run(build, out)
    seen: dict[str, Array] = {}
    for target in BOTH.targets:
        for component in components(build.checkpoint, target.runtime):
            path = out / target.runtime / component.file
            data = path.with_name(path.name + ".data")
            fact = {"bytes": data.stat().st_size, "sha256": sha256(data)}
            assert facts[f"{target.runtime}/{component.file}.data"] == fact
            assert data.samefile(out / "genai" / data.name)
            seen |= read_back(path)
    assert set(seen) == {f"{name}_out" for name in build.checkpoint.tensors}
    for name in build.checkpoint.tensors:
        np.testing.assert_array_equal(seen[f"{name}_out"], build.checkpoint.read(name))


@pytest.mark.parametrize("runtime", ["genai", "onnxruntime"])
def test_a_tensor_in_no_graph_of_a_target_is_an_error(build: Build, tmp_path: Path, runtime: str) -> None:
    left = "model.visual.pos_embed.weight"
    share_out(build, runtime, [name for name in build.checkpoint.tensors if name != left])
    with pytest.raises(WeightError) as caught:
        quantize.run(build, tmp_path / "part")
    assert caught.value.what == f"1 checkpoint tensors are in no graph of the target {runtime}"
    assert caught.value.found == left


def test_an_untied_head_that_no_graph_reads_is_an_error(build: Build, tmp_path: Path) -> None:
    share_out(build, "genai", [name for name in build.checkpoint.tensors if name != "lm_head.weight"])
    with pytest.raises(WeightError, match="lm_head"):
        quantize.run(build, tmp_path / "part")


def test_many_tensors_left_over_are_counted_and_the_first_named(build: Build, tmp_path: Path) -> None:
    share_out(build, "genai", [name for name in build.checkpoint.tensors if ".mlp." not in name])
    with pytest.raises(WeightError) as caught:
        quantize.run(build, tmp_path / "part")
    count = sum(".mlp." in name for name in build.checkpoint.tensors)
    assert caught.value.what.startswith(f"{count} checkpoint tensors")
    assert str(caught.value.found).count(", ") == 4
    assert str(caught.value.found).endswith("…")
