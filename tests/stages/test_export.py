"""Traced graphs: no weights read, no constants of the example inputs, every initializer bound."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from builder.checkpoint.load import Checkpoint, open_checkpoint
from builder.graph.binding import BoundGraph, load, save
from builder.reference.meta_model import empty_model
from builder.stages import export
from builder.stages.optimize import optimize
from builder.targets.graphs import components
from builder.targets.recipe import Target
from builder.util.errors import WeightError
from patches import patches_for
from patches.registry import applied
from tests.helpers.checkpoints import write_checkpoint

pytestmark = pytest.mark.torch

TARGETS = [Target("genai", "fused"), Target("onnxruntime", "eager")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """One text and two vision layers; its weights are removed once it is open."""
    folder = tmp_path_factory.mktemp("one") / "layer"
    write_checkpoint(folder, text={"num_hidden_layers": 1}, vision={"depth": 2}, deepstack=(0,))
    opened = open_checkpoint(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return opened


@pytest.fixture(scope="module")
def graphs(checkpoint: Checkpoint) -> dict[Target, dict[str, BoundGraph]]:
    """As traced, by target and name; no test changes them."""
    return {target: traced(checkpoint, target) for target in TARGETS}


def traced(checkpoint: Checkpoint, target: Target) -> dict[str, BoundGraph]:
    model = empty_model(checkpoint)
    with applied(patches_for(target.attention)):
        return {
            component.name: export.export(checkpoint, model, target, component)
            for component in components(checkpoint, target.runtime)
        }


def optimized(graphs: dict[str, BoundGraph], target: Target, folder: Path) -> dict[str, bytes]:
    """The bytes that the stage `optimize` writes, from those that `export` writes."""
    content = {}
    for name, graph in graphs.items():
        save(graph, folder / name)
        save(optimize(load(folder / name), target, name)[0], folder / name)
        content[name] = (folder / name).read_bytes()
    return content


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.runtime)
def test_nothing_of_the_example_is_left(
    checkpoint: Checkpoint,
    graphs: dict[Target, dict[str, BoundGraph]],
    target: Target,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    first = optimized(graphs[target], target, tmp_path)
    monkeypatch.setattr(export, "EXAMPLE_SIZES", {"batch": 3, "seq": 11, "past": 6, "total": 17})
    monkeypatch.setattr(export, "EXAMPLE_GRIDS", ((1, 6, 2), (1, 3, 5), (3, 2, 4)))
    assert optimized(traced(checkpoint, target), target, tmp_path) == first


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.runtime)
def test_every_initializer_is_bound_or_recomputed(
    checkpoint: Checkpoint, graphs: dict[Target, dict[str, BoundGraph]], target: Target
) -> None:
    bound = {binding.tensor for graph in graphs[target].values() for binding in graph.bindings.values()}
    assert bound == set(checkpoint.tensors)
    for graph in graphs[target].values():
        loose = set(graph.model.graph.initializers) - set(graph.bindings)
        assert all(name.endswith(export.RECOMPUTED) or export.TRACED_CONSTANT in name for name in loose), loose


def test_ports_are_the_contract(checkpoint: Checkpoint, graphs: dict[Target, dict[str, BoundGraph]]) -> None:
    for target in TARGETS:
        for component in components(checkpoint, target.runtime):
            graph = graphs[target][component.name].model.graph
            for values, ports in ((graph.inputs, component.inputs), (graph.outputs, component.outputs)):
                assert [value.name for value in values] == [port.name for port in ports]
                assert [tuple(map(str, value.shape or ())) for value in values] == [
                    tuple(map(str, port.shape)) for port in ports
                ]
                assert [str(value.dtype) for value in values] == [
                    {"float32": "FLOAT", "int64": "INT64"}[port.dtype] for port in ports
                ]


def test_a_weight_that_the_checkpoint_lacks_is_named(checkpoint: Checkpoint) -> None:
    lost = "model.visual.blocks.0.mlp.linear_fc1.weight"
    without = replace(checkpoint, tensors={k: v for k, v in checkpoint.tensors.items() if k != lost})
    with pytest.raises(WeightError) as error:
        traced(without, TARGETS[0])
    assert lost in str(error.value)
