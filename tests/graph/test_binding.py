"""binding: graphs without weights are saved and loaded with their bindings, and rejected by a runtime."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from builder.graph.binding import UNBOUND, Binding, BoundGraph, bind, bindings_file, load, save, unbound
from builder.quantization.blockwise import Blocks
from builder.quantization.packing import parts
from builder.util.errors import WeightError
from tests.helpers.small_graphs import bound_graph, drawn, run

WEIGHTS = {"down": drawn(3, 4), "up": drawn(4, 3)}
TEXT = "two (float[seq, 3] x) => (float[seq, 3] y) { h = MatMul(x, down) y = MatMul(h, up) }"
MIXED = (
    Binding("down", "model.down.weight", "float32", (4, 3), transposed=True),
    Binding("up", "model.up.weight", "float32", (4, 3)),
)


def test_stored_shape_is_that_of_the_graph() -> None:
    binding = Binding("w", "t", "float32", (2, 5))
    assert binding.stored_shape == (2, 5)
    assert binding.with_axes_swapped().stored_shape == (5, 2)
    assert binding.with_axes_swapped().with_axes_swapped() == binding


def test_bindings_and_graph_survive_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model.onnx"
    saved = bind(bound_graph(TEXT, WEIGHTS).model, MIXED)
    save(saved, path)
    loaded = load(path)
    assert dict(loaded.bindings) == {binding.initializer: binding for binding in MIXED} == dict(saved.bindings)
    assert [node.op_type for node in loaded.model.graph] == ["MatMul", "MatMul"]
    for name, binding in loaded.bindings.items():
        value = loaded.model.graph.initializers[name]
        assert value.shape == binding.stored_shape
        assert value.dtype == ir.DataType.FLOAT
        assert isinstance(value.const_value, ir.ExternalTensor)
        assert value.const_value.location == UNBOUND


def test_saving_again_gives_the_same_bytes(tmp_path: Path) -> None:
    graph = bind(bound_graph(TEXT, WEIGHTS).model, MIXED)
    save(graph, tmp_path / "one.onnx")
    save(load(tmp_path / "one.onnx"), tmp_path / "two.onnx")
    save(bind(bound_graph(TEXT, WEIGHTS).model, reversed(MIXED)), tmp_path / "three.onnx")
    for other in ("two.onnx", "three.onnx"):
        assert (tmp_path / other).read_bytes() == (tmp_path / "one.onnx").read_bytes()
        assert bindings_file(tmp_path / other).read_text() == bindings_file(tmp_path / "one.onnx").read_text()


def test_no_weight_byte_is_written(tmp_path: Path) -> None:
    text = "big (float[n, 65536] x) => (float[n, 8] y) { y = MatMul(x, weight) }"
    save(bound_graph(text, {"weight": drawn(65536, 8)}), tmp_path / "big.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"big.onnx", "big.onnx.bindings.json"}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2000


def test_onnxruntime_rejects_a_graph_without_its_weights(tmp_path: Path) -> None:
    save(bound_graph(TEXT, WEIGHTS), tmp_path / "model.onnx")
    with pytest.raises(Exception, match=r"<unbound>|xternal data") as caught:
        onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert type(caught.value).__module__.startswith("onnxruntime")


def test_a_binding_without_an_initializer_is_an_error() -> None:
    stray = Binding("left", "model.left.weight", "float32", (4, 3))
    with pytest.raises(WeightError, match="no initializer left") as caught:
        bind(bound_graph(TEXT, WEIGHTS).model, (*MIXED, stray))
    assert "model.left.weight" in str(caught.value.found)


def test_a_binding_that_the_graph_on_disk_lost_is_an_error(tmp_path: Path) -> None:
    save(bound_graph(TEXT, WEIGHTS), tmp_path / "model.onnx")
    rows = json.loads(bindings_file(tmp_path / "model.onnx").read_text())
    rows.append({**rows[0], "initializer": "left"})
    bindings_file(tmp_path / "model.onnx").write_text(json.dumps(rows))
    with pytest.raises(WeightError, match="no initializer left"):
        load(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "binding",
    [
        pytest.param(Binding("down", "t", "float32", (4, 3)), id="the other way round"),
        pytest.param(Binding("down", "t", "float32", (3, 4), transposed=True), id="a transposition the graph lacks"),
        pytest.param(Binding("down", "t", "float32", (12,)), id="flat"),
        pytest.param(Binding("down", "t", "float32", (3, 5)), id="larger"),
    ],
)
def test_a_binding_of_another_shape_than_the_graph_has_is_an_error(binding: Binding) -> None:
    with pytest.raises(WeightError, match="down") as caught:
        bind(bound_graph(TEXT, WEIGHTS).model, [binding])
    assert str(caught.value.expected) == "[3,4]"


PARTED = Binding("q.levels", "q", "uint8", (24, 64), below=("k", "v"), blocks=Blocks(4, 32, True, "mse"), part="levels")


def test_the_parts_of_a_quantized_matrix_have_the_shapes_of_their_operator() -> None:
    scales = replace(PARTED, initializer="q.scales", dtype="float16", part="scales")
    zeros = replace(PARTED, initializer="q.zero_points", part="zero_points")
    assert [part.stored_shape for part in (PARTED, scales, zeros)] == [(24, 2, 16), (24, 2), (24, 1)]
    assert [part.nbytes for part in (PARTED, scales, zeros)] == [24 * 64 // 2, 24 * 2 * 2, 24]
    assert PARTED.tensors == ("q", "k", "v")


def test_content_identifies_bytes_and_source_the_matrix() -> None:
    viewed = replace(PARTED, initializer="other", view=(24, 32))
    assert viewed.stored_shape == (24, 32)
    assert viewed.nbytes == PARTED.nbytes
    assert viewed.content == PARTED.content != replace(PARTED, part="scales").content
    scales = replace(PARTED, dtype="float16", part="scales")
    assert scales.source == PARTED.source
    for other in (
        replace(PARTED, below=("v", "k")),
        replace(PARTED, blocks=Blocks(4, 16, True, "mse")),
        replace(PARTED, blocks=Blocks(4, 32, True, "none")),
    ):
        assert other.content != PARTED.content
        assert other.source != PARTED.source


def test_quantized_bindings_survive_the_disk(tmp_path: Path) -> None:
    text = """quantized (float[n, 64] x, uint8[24, 2, 16] q, float[24, 2] s, uint8[24, 1] z) => (float[n, 24] y) {
        y = com.microsoft.MatMulNBits <K = 64, N = 24, bits = 4, block_size = 32> (x, q, s, z)
    }"""
    model = bound_graph(text).model
    bindings = [
        replace(PARTED, initializer=name, part=part, dtype="float32" if name == "s" else "uint8")
        for name, part in zip("qsz", parts(Blocks(4, 32, True)), strict=True)
    ]
    for value in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(value)
        model.graph.initializers.add(value)
    save(bind(model, bindings), tmp_path / "model.onnx")
    loaded = load(tmp_path / "model.onnx")
    assert dict(loaded.bindings) == {binding.initializer: binding for binding in bindings}
    assert loaded.model.graph.initializers["q"].dtype == ir.DataType.UINT8


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "FLOAT"), ("float16", "FLOAT16"), ("bfloat16", "BFLOAT16")])
def test_a_placeholder_has_type_and_shape_but_no_bytes(dtype: str, kind: str) -> None:
    tensor = unbound(Binding("w", "t", dtype, (2, 5), transposed=True))
    assert tensor.dtype == ir.DataType[kind]
    assert tensor.shape == (5, 2)
    with pytest.raises(FileNotFoundError):
        tensor.numpy()


TRACE = 'File "/home/someone/checkout/builder/graph/modules.py", line 43, in forward'


def littered() -> BoundGraph:
    """A graph with the exporter's metadata everywhere, in a subgraph too."""
    text = """notes (float[n, 4] x, bool really) => (float[n, 5] y) {
        turned = Transpose <perm = [1, 0]> (weight)
        linear = MatMul(x, turned)
        y = If (really) <
            then_branch = yes () => (float[n, 5] then_out) { then_out = Neg(linear) },
            else_branch = no () => (float[n, 5] else_out) { else_out = Exp(linear) }
        >
    }"""
    noted = bound_graph(text, {"weight": drawn(5, 4)})
    model = noted.model
    model.producer_version, model.doc_string, model.graph.doc_string = "2.13.0+cpu", TRACE, TRACE
    things: list[Any] = [
        model,
        model.graph,
        *model.graph.subgraphs(),
        *model.graph.inputs,
        *model.graph.initializers.values(),
    ]
    for node in model.graph.all_nodes():
        node.doc_string = TRACE
        things += [node, *node.outputs]
    for thing in things:
        thing.metadata_props["pkg.torch.onnx.stack_trace"] = TRACE
    return noted


def test_no_path_of_the_machine_is_left(tmp_path: Path) -> None:
    noted, weights = littered(), {"weight": drawn(5, 4)}
    feed = {"x": drawn(3, 4), "really": np.array(True)}
    before = run(noted, weights, **feed)
    assert TRACE.encode() in ir.to_proto(noted.model).SerializeToString()
    save(noted, tmp_path / "after.onnx")
    content = (tmp_path / "after.onnx").read_bytes()
    for trace in (b"/home/", b"stack_trace", b"2.13.0"):
        assert trace not in content
    np.testing.assert_array_equal(run(load(tmp_path / "after.onnx"), weights, **feed), before)
