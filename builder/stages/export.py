"""Stage 3: trace the graphs of each target on empty weights, one layer of each kind, and bind their initializers.

Guarantees: no weight is read or allocated; every initializer is bound to a checkpoint tensor (builder/graph/binding.py)
or is in `RECOMPUTED`; ports have the names, types and axis names of builder/graph/ports.py.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from builder.checkpoint.load import Checkpoint
from builder.checkpoint.parts import DECODER, VISION
from builder.graph.binding import Binding, BoundGraph, bind, save
from builder.graph.ports import Component, Port
from builder.graph.unroll import decoder_kinds, shortened, unroll, vision_kinds
from builder.reference.meta_model import empty_model
from builder.targets.graphs import GRAPHS, components
from builder.targets.graphs import module as module_of
from builder.util.errors import WeightError
from builder.util.progress import progress

if TYPE_CHECKING:
    from builder.stages.engine.build import Build
    from builder.targets.recipe import Target

RECOMPUTED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")  # non-persistent buffers: not in checkpoints
TRACED_CONSTANT = "lifted_tensor"  # the exporter's name for a tensor constant in the traced code
KINDS = {VISION: vision_kinds, DECODER: decoder_kinds}
# Sizes of example inputs, which are dynamic in the graph. They are distinct so that no axes are confused.
EXAMPLE_SIZES = {"batch": 2, "batch_size": 2, "seq": 5, "past": 7, "total": 12}
EXAMPLE_GRIDS = ((1, 4, 6), (2, 2, 2))  # height and width in merge blocks


def run(build: Build, out: Path) -> Mapping[str, object]:
    """Export every target of the recipe, and return the counts of nodes and bound initializers per graph."""
    from patches import patches_for
    from patches.registry import applied

    facts: dict[str, object] = {}
    model = empty_model(shortened(build.checkpoint))
    with progress("export", 3 * len(build.recipe.targets)) as advance:
        for target in build.recipe.targets:
            with applied(patches_for(target.attention)):
                for component in components(build.checkpoint, target.runtime):
                    exported = export(build.checkpoint, model, target, component)
                    save(exported, out / target.runtime / component.file)
                    facts[f"{target.runtime}/{component.file}"] = {
                        "nodes": len(exported.model.graph),
                        "bound initializers": len(exported.bindings),
                    }
                    advance()
    return facts


def export(checkpoint: Checkpoint, model: Any, target: Target, component: Component) -> BoundGraph:
    """Export one graph of a target, bound. Call under `patches.registry.applied`.

    Args:
        model: the empty model of `shortened(checkpoint)`, with one layer of each kind.

    Raises:
        WeightError: an initializer is neither a checkpoint tensor nor a recomputed buffer.
    """
    short = shortened(checkpoint)
    few = next(each for each in components(short, target.runtime) if each.name == component.name)
    traced = trace(short, model, target, few)
    if component.name not in KINDS:
        return traced
    return unroll(traced, KINDS[component.name](checkpoint), component)


def trace(checkpoint: Checkpoint, model: Any, target: Target, component: Component) -> BoundGraph:
    """Trace `model` without unrolling, keep the marks of its layers, and bind it.

    Raises:
        WeightError: an initializer is neither a checkpoint tensor nor a recomputed buffer.
    """
    import torch

    # The exporter warns for every graph that torchvision's operators, which are not used, are missing.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    module = module_of(checkpoint, model, component.name, target)
    inputs = _example_inputs(checkpoint, component)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            _arguments(component, inputs),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=GRAPHS[target.runtime].opset,
            input_names=[port.name for port in component.inputs],
            output_names=[port.name for port in component.outputs],
            dynamic_shapes=_dynamic_shapes(module, component),
        )
    assert program is not None
    ir_model = program.model
    _declare(ir_model, component)
    return bind(ir_model, _bindings(checkpoint, model, module, ir_model))


def _arguments(component: Component, values: list[Any]) -> tuple[Any, ...]:
    """Group the past key/value inputs into a list argument; other inputs are separate arguments."""
    first_past = next(
        (i for i, port in enumerate(component.inputs) if port.name.startswith("past_key_values.")),
        len(values),
    )
    past = values[first_past:]
    return (*values[:first_past], *([past] if past else []))


def _dynamic_shapes(module: Any, component: Component) -> dict[str, Any]:
    shapes = _arguments(component, [_dynamic(port) for port in component.inputs])
    names = list(inspect.signature(module.forward).parameters)
    if names[-1] == "rest":
        return {names[0]: shapes[0], "rest": shapes[1:]}
    return dict(zip(names, shapes, strict=True))


def _dynamic(port: Port) -> dict[int, str]:
    return {axis: dim for axis, dim in enumerate(port.shape) if isinstance(dim, str)}


def _example_inputs(checkpoint: Checkpoint, component: Component) -> list[Any]:
    import torch

    merge = checkpoint.vision.merge_size
    grid = torch.tensor([[t, h * merge, w * merge] for t, h, w in EXAMPLE_GRIDS], dtype=torch.int64)
    patches = int(grid.prod(1).sum())
    sizes = {**EXAMPLE_SIZES, "images": len(grid), "patches": patches, "tokens": patches // merge**2}
    values = []
    for port in component.inputs:
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in port.shape]
        value = torch.zeros(shape, dtype=getattr(torch, port.dtype))
        if port.name == "image_grid_thw":
            value = grid
        if port.name == "attention_mask":
            value = torch.ones_like(value)
        values.append(value)
    return values


def _declare(model: ir.Model, component: Component) -> None:
    """Set names and shapes of the ports to the component's."""
    for values, ports in ((model.graph.inputs, component.inputs), (model.graph.outputs, component.outputs)):
        assert len(values) == len(ports), f"{component.name}: {len(values)} ports traced, {len(ports)} expected"
        for value, port in zip(values, ports, strict=True):
            value.name, value.shape = port.name, ir.Shape(port.shape)
    model.graph.name = component.name


def _bindings(checkpoint: Checkpoint, model: Any, module: Any, ir_model: ir.Model) -> list[Binding]:
    names = {id(parameter): name for name, parameter in reversed(list(model.named_parameters()))}
    inside = {name: names[id(parameter)] for name, parameter in module.named_parameters(remove_duplicate=False)}
    bindings = []
    for name, value in ir_model.graph.initializers.items():
        if name in inside:
            tensor = inside[name]
            if tensor not in checkpoint.tensors:
                raise WeightError(
                    f"the checkpoint has no tensor for the initializer {name}",
                    expected=tensor,
                    found="no such tensor",
                )
            assert value.shape is not None
            bindings.append(Binding(name, tensor, "float32", tuple(value.shape.numpy())))
        elif "." in name and not name.endswith(RECOMPUTED) and TRACED_CONSTANT not in name:
            raise WeightError(f"initializer {name} is neither a checkpoint tensor nor one of {', '.join(RECOMPUTED)}")
    return bindings
