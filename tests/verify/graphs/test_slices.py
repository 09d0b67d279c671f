"""Test slices: run in sequence they equal the graph bitwise, at any size."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from builder.checkpoint.parts import DECODER, EMBEDDINGS, VISION
from builder.graph.ports import RESIDUAL
from builder.util.errors import BundleError
from builder.verify.graphs import slices
from builder.verify.graphs.sessions import PAST, PRESENT, Values
from builder.verify.graphs.slices import run_slices, sliced

pytestmark = pytest.mark.torch  # the fixture builds

TARGETS = ("genai", "onnxruntime")


def session(folder: Path, name: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])


def random_inputs(ports: list[onnxruntime.NodeArg], seq: int, past: int, batch: int, seed: int) -> Values:
    """Return inputs of a decoder call, without its past."""
    rng = np.random.default_rng(seed)
    sizes = {"batch": batch, "seq": seq, "total": past + seq}
    values: Values = {}
    for port in ports:
        shape = [sizes.get(dim, dim) for dim in port.shape]
        if port.name == "attention_mask":
            values[port.name] = np.ones(shape, np.int64)
        elif port.name == "position_ids":
            values[port.name] = np.broadcast_to(np.arange(past, past + seq), shape).copy()
        elif not port.name.startswith(PAST):
            values[port.name] = rng.standard_normal(shape, np.float32) * np.float32(0.1)
    return values


def run_complete(folder: Path, calls: list[Values]) -> list[Values]:
    """Run the decoder in one session."""
    decoder = session(folder, DECODER)
    names = [port.name for port in decoder.get_outputs()]
    batch = calls[0]["attention_mask"].shape[0]
    past = {
        port.name: np.zeros((batch, port.shape[1], 0, port.shape[3]), np.float32)
        for port in decoder.get_inputs()
        if port.name.startswith(PAST)
    }
    results = []
    for call in calls:
        values = dict(zip(names, decoder.run(names, {**call, **past}), strict=True))
        past = {name: values[PRESENT + name.removeprefix(PAST)] for name in past}
        results.append({"logits": values["logits"]})
    return results


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("budget", "count"), [(0, 6), (2_000_000, 4), (10**9, 1)])
def test_conversations_through_slices_equal_the_complete_graph(
    miniature_built: Path, target: str, budget: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two conversations of three calls each, one with a batch of two, without separate processes."""
    monkeypatch.setattr(slices, "_in_process", slices.compute)
    folder = miniature_built / target
    parts = sliced(folder / f"{DECODER}.onnx", budget)
    assert len(parts) == count
    ports = session(folder, DECODER).get_inputs()
    # Fused attention takes several tokens on a past only with a batch of one.
    spans = {1: ((7, 0), (3, 7), (1, 10)), 2: ((7, 0), (1, 7), (1, 8))}
    talks = [
        [random_inputs(ports, *span, batch=batch, seed=number) for number, span in enumerate(row)]
        for batch, row in spans.items()
    ]
    results, peak = run_slices(parts, folder, talks)
    assert peak > 0
    for talk, got in zip(talks, results, strict=True):
        for call, values, want in zip(talk, got, run_complete(folder, talk), strict=True):
            np.testing.assert_array_equal(values["logits"], want["logits"])
            batch, seq = call["attention_mask"].shape[0], call["position_ids"].shape[2]
            streams = [value for name, value in values.items() if name.startswith(RESIDUAL)]
            assert [stream.shape[:2] for stream in streams] == [(batch, seq)] * 5
            assert len(values) == 6


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [VISION, DECODER, EMBEDDINGS])
def test_every_node_and_every_weight_is_in_one_slice(miniature_built: Path, target: str, name: str) -> None:
    path = miniature_built / target / f"{name}.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    parts = [onnx.load_from_string(part.model) for part in sliced(path, 0)]
    nodes = [node.name for part in parts for node in part.graph.node if node.op_type != "Constant"]
    assert nodes == [node.name for node in graph.node if node.op_type != "Constant"]
    large = {tensor.name for tensor in graph.initializer if tensor.external_data}
    held = [tensor.name for part in parts for tensor in part.graph.initializer if tensor.external_data]
    assert sorted(held) == sorted(large)
    assert sum(part.nbytes for part in sliced(path, 10**9)) <= sum(part.nbytes for part in sliced(path, 0))


def test_a_slice_runs_in_a_separate_process(miniature_built: Path) -> None:
    folder = miniature_built / "genai"
    embeddings = session(folder, EMBEDDINGS)
    width = embeddings.get_outputs()[0].shape[-1]
    call = {"input_ids": np.arange(12).reshape(2, 6), "image_features": np.zeros((0, width), np.float32)}
    ((got,),), peak = run_slices(sliced(folder / f"{EMBEDDINGS}.onnx", 10**9), folder, [[call]])
    np.testing.assert_array_equal(got["inputs_embeds"], embeddings.run(None, call)[0])
    assert 0 < peak < 200e6  # no torch, which this process has


def test_missing_data_is_reported(bundle: Callable[[str], Path]) -> None:
    folder = bundle("genai")
    parts, ports = sliced(folder / f"{DECODER}.onnx", 10**9), session(folder, DECODER).get_inputs()
    (folder / f"{DECODER}.onnx.data").unlink()
    with pytest.raises(BundleError, match="does not run in onnxruntime"):
        run_slices(parts, folder, [[random_inputs(ports, 4, 0, 1, 0)]])


def killed(*_: object) -> None:
    """Simulate a slice that the system kills."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_reported(miniature_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "compute", killed)
    folder = miniature_built / "genai"
    with pytest.raises(BundleError, match="was killed") as caught:
        run_slices(sliced(folder / f"{EMBEDDINGS}.onnx", 10**9), folder, [[{}]])
    assert "--memory" in str(caught.value.next)


def test_a_graph_whose_layers_read_one_anothers_past_is_refused(bundle: Callable[[str], Path]) -> None:
    path = bundle("onnxruntime") / f"{DECODER}.onnx"
    model = onnx.load(path, load_external_data=False)
    (node,) = [node for node in model.graph.node if "present.2.key" in node.output]
    node.input[0] = "past_key_values.1.key"
    path.unlink()
    onnx.save(model, path)
    with pytest.raises(BundleError, match="cannot be cut"):
        sliced(path, 0)
