"""quantize: the filled graph has the checkpoint's values, equal data is one file, every tensor is used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from safetensors.numpy import save_file

from builder.checkpoint.load import Checkpoint, open_checkpoint
from builder.checkpoint.safetensors import index_tensors
from builder.checkpoint.source import parse_source
from builder.checkpoint.tensors import EMBEDDINGS, LM_HEAD
from builder.graph.binding import Binding, BoundGraph, bind, save
from builder.graph.data_files import data_path, fill
from builder.graph.external_data import DIGESTS, DataFile, padded
from builder.graph.passes.fold_weight_transposes import fold_weight_transposes
from builder.graph.passes.gemm_head import gemm_head
from builder.graph.passes.result import PassResult
from builder.stages import fetch, quantize
from builder.stages.engine.build import Build
from builder.targets.graphs import components
from builder.targets.recipe import Recipe, Target
from builder.util.errors import CheckpointError, WeightError
from builder.util.files import sha256
from tests.helpers.edits import rewritten
from tests.helpers.small_graphs import Array, bound_graph, bound_to, drawn

TENSORS = {
    "plain": drawn(3, 5).astype(np.float16),
    "turned": drawn(3, 5, seed=1).astype(ml_dtypes.bfloat16),
    "conv": drawn(4, 3, 2, 2, 2).astype(ml_dtypes.bfloat16),
    "scalar": np.array(1.5, np.float32),
}
BINDINGS = (
    Binding("a", "plain", "float32", (3, 5)),
    Binding("b", "turned", "float32", (3, 5), transposed=True),
    Binding("c", "conv", "float32", (4, 24)),
    Binding("d", "scalar", "float32", ()),
)
BOTH = Recipe("both", "fp32", (Target("genai", "fused"), Target("onnxruntime", "eager")), 128)


@pytest.fixture
def source(tmp_path: Path, miniature: Path) -> Checkpoint:
    return checkpoint_of(tmp_path / "checkpoint", TENSORS, miniature)


def checkpoint_of(folder: Path, tensors: Mapping[str, Array], miniature: Path) -> Checkpoint:
    """A checkpoint with only these tensors."""
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors")
    return replace(open_checkpoint(miniature), folder=folder, tensors=index_tensors(folder, ["model.safetensors"]))


def weights_as_outputs(bindings: Sequence[Binding]) -> BoundGraph:
    """A graph without inputs that returns each of its initializers."""
    weights = [
        ir.Value(name=binding.initializer, shape=ir.Shape(binding.stored_shape), type=ir.TensorType(ir.DataType.FLOAT))
        for binding in bindings
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


def filled(source: Checkpoint, *targets: Mapping[Path, Sequence[Binding]]) -> Mapping[Path, DataFile]:
    """The data files of targets whose graphs return these bindings."""
    graphs = [{path: weights_as_outputs(bindings) for path, bindings in target.items()} for target in targets]
    return fill(graphs, source)[0]


def test_onnxruntime_reads_the_checkpoints_numbers(source: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "out" / "model.onnx"
    files = filled(source, {path: BINDINGS})
    got = read_back(path)
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
    assert {path: data.sha256 for path, data in files.items()} == {
        data_path(path): sha256(tmp_path / "out" / "model.onnx.data")
    }


def test_every_file_that_is_read_has_its_digest(source: Checkpoint, tmp_path: Path) -> None:
    _, shards = fill([{tmp_path / "model.onnx": weights_as_outputs(BINDINGS[:1])}], source)
    assert shards == {"model.safetensors": sha256(source.folder / "model.safetensors")}


def test_the_pair_runs_from_wherever_it_is_moved_to(source: Checkpoint, tmp_path: Path) -> None:
    filled(source, {tmp_path / "here" / "model.onnx": BINDINGS})
    before = read_back(tmp_path / "here" / "model.onnx")
    os.rename(tmp_path / "here", tmp_path / "there")
    assert str(tmp_path).encode() not in (tmp_path / "there" / "model.onnx").read_bytes()
    after = read_back(tmp_path / "there" / "model.onnx")
    assert all(np.array_equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("reverse", [False, True], ids=["named alike", "in another order"])
def test_equal_data_of_two_targets_is_one_file(source: Checkpoint, tmp_path: Path, reverse: bool) -> None:
    """Initializers may have different names: their order is the checkpoint's."""
    names = ("z", "y", "x", "w") if reverse else ("a", "b", "c", "d")
    renamed = [replace(binding, initializer=f"model.{name}") for name, binding in zip(names, BINDINGS, strict=True)]
    first, second = (tmp_path / runtime / "model.onnx" for runtime in ("genai", "onnxruntime"))
    files = filled(source, {first: BINDINGS}, {second: renamed})
    one, two = map(data_path, (first, second))
    assert os.path.samefile(one, two)
    assert files[one] == files[two]
    before, after = read_back(first), read_back(second)
    for binding, other in zip(BINDINGS, renamed, strict=True):
        np.testing.assert_array_equal(after[f"{other.initializer}_out"], before[f"{binding.initializer}_out"])


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(replace(BINDINGS[0], transposed=True), id="transposed"),
        pytest.param(replace(BINDINGS[0], tensor="turned"), id="another tensor"),
    ],
)
def test_other_data_of_another_target_is_a_file_of_its_own(
    source: Checkpoint, tmp_path: Path, changed: Binding
) -> None:
    one, two = tmp_path / "one" / "model.onnx", tmp_path / "two" / "model.onnx"
    filled(source, {one: BINDINGS}, {two: (changed, *BINDINGS[1:])})
    assert not os.path.samefile(data_path(one), data_path(two))
    want = TENSORS[changed.tensor].astype(np.float32)
    np.testing.assert_array_equal(read_back(two)["a_out"], want.T if changed.transposed else want)
    np.testing.assert_array_equal(read_back(one)["a_out"], TENSORS["plain"].astype(np.float32))


def test_a_tensor_shared_by_two_graphs_is_in_the_last_graphs_file(source: Checkpoint, tmp_path: Path) -> None:
    """The middle graph has no tensors of its own, and no file."""
    parts = {"vision": BINDINGS[:2], "embeddings": BINDINGS[2:3], "model": (BINDINGS[0], *BINDINGS[2:])}
    files = filled(source, {tmp_path / "out" / f"{name}.onnx": bindings for name, bindings in parts.items()})
    assert {path.name for path in files} == {"vision.onnx.data", "model.onnx.data"}
    assert {path.name for path in (tmp_path / "out").glob("*.data")} == {path.name for path in files}
    assert [len(data.placements) for _, data in sorted(files.items())] == [3, 1]
    for name, bindings in parts.items():
        got = read_back(tmp_path / "out" / f"{name}.onnx")
        for binding in bindings:
            want = TENSORS[binding.tensor].reshape(binding.shape).astype(np.float32)
            np.testing.assert_array_equal(got[f"{binding.initializer}_out"], want.T if binding.transposed else want)


# hidden 8, vocab 12
LOOKUP = "embeddings (int64[seq] ids) => (float[seq, 8] rows) { rows = Gather <axis = 0> (table, ids) }"
HEAD = """model (float[seq, 8] x) => (float[seq, 12] logits) {
    turned = Transpose <perm = [1, 0]> (head)
    logits = MatMul(x, turned)
}"""


@pytest.mark.parametrize(
    ("tied", "write", "files"),
    [
        pytest.param(True, gemm_head, {"model.onnx.data"}, id="tied"),
        pytest.param(False, gemm_head, {"embeddings.onnx.data", "model.onnx.data"}, id="untied"),
        # What `gemm_head` is for: turned, the head is another content.
        pytest.param(True, fold_weight_transposes, {"embeddings.onnx.data", "model.onnx.data"}, id="tied, turned"),
    ],
)
def test_a_tied_head_is_stored_once(
    tmp_path: Path, miniature: Path, tied: bool, write: Callable[[BoundGraph], PassResult], files: set[str]
) -> None:
    tensors = {EMBEDDINGS: drawn(12, 8).astype(ml_dtypes.bfloat16)}
    tensors |= {} if tied else {LM_HEAD: drawn(12, 8, seed=1).astype(ml_dtypes.bfloat16)}
    table, head = (tensors[name].astype(np.float32) for name in (EMBEDDINGS, EMBEDDINGS if tied else LM_HEAD))
    opened = checkpoint_of(tmp_path / "checkpoint", tensors, miniature)
    decoder = bound_to(bound_graph(HEAD, {"head": head}), head=EMBEDDINGS if tied else LM_HEAD)
    graphs = {
        "embeddings.onnx": bound_to(bound_graph(LOOKUP, {"table": table}), table=EMBEDDINGS),
        "model.onnx": write(decoder).graph,
    }
    out = tmp_path / "out"
    fill([{out / name: graph for name, graph in graphs.items()}], opened)
    assert {path.name for path in out.glob("*.data")} == files
    assert sum(path.stat().st_size for path in out.glob("*.data")) == len(files) * padded(table.nbytes)
    lookup, decode = (onnxruntime.InferenceSession(str(out / name)) for name in graphs)
    ids, x = np.array([11, 0, 3]), drawn(3, 8)
    np.testing.assert_array_equal(lookup.run(None, {"ids": ids})[0], table[ids])
    np.testing.assert_allclose(decode.run(None, {"x": x})[0], x @ head.T, rtol=1e-5, atol=1e-5)


@pytest.fixture
def build(checkpoint: Callable[[str], Path], tmp_path: Path) -> Build:
    """Untied, in two shards; the graphs of `optimize` use every tensor, the same for each target."""
    copy = Path(shutil.copytree(checkpoint("untied"), tmp_path / "untied"))
    prepared = Build(parse_source(str(copy)), BOTH, tmp_path / "out")
    fetched(prepared)
    for target in BOTH.targets:
        share_out(prepared, target.runtime, list(prepared.checkpoint.tensors))
    return prepared


def fetched(build: Build) -> None:
    """The stage `optimize`."""
    build.folder("fetch").mkdir(parents=True, exist_ok=True)
    fetch.run(build, build.folder("fetch"))


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
    digests = json.loads((out / DIGESTS).read_text())
    shards = {file.name: sha256(file) for file in build.checkpoint.folder.glob("*.safetensors")}
    assert digests == {"data": facts, "checkpoint": shards}
    assert len(shards) == 2


@pytest.mark.parametrize("forged", [False, True], ids=["at another time", "of the same time"])
def test_a_shard_that_changed_since_it_was_fetched_is_an_error(build: Build, tmp_path: Path, forged: bool) -> None:
    """The size is the same. Its time differs; where that is forged, its digest, if taken with `--rehash`."""
    shard = sorted(build.checkpoint.folder.glob("*.safetensors"))[1]
    fetched(replace(build, rehash=forged))
    before = shard.stat()
    rewritten(shard)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + (0 if forged else 1)))
    with pytest.raises(CheckpointError, match=r"changed since it was fetched") as caught:
        quantize.run(build, tmp_path / "part")
    assert str(shard) in caught.value.what
    assert str(caught.value.found).startswith("sha256" if forged else "time")
    assert all(caught.value.as_dict()[part] for part in ("expected", "found", "next"))
    assert not (tmp_path / "part" / DIGESTS).exists()


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
