"""Stage 3: trace the three graphs of each target on empty weights, one layer of each kind.

In: the checkpoint's config alone and the patches. Out: `<target>/<graph>.onnx` with bindings
(builder/graph/binding.py).
Guaranteed: no weight is read and no weight page touched; every initializer is bound to a checkpoint tensor or is one of
`RECOMPUTED`; ports carry the names, types and axis names of builder/graph/ports.py.
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

RECOMPUTED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")  # non-persistent: no checkpoint has them
TRACED_CONSTANT = "lifted_tensor"  # the exporter's name for a tensor that the traced code wrote out
KINDS = {VISION: vision_kinds, DECODER: decoder_kinds}
# What is traced with leaves no trace in the graph. No two axes are of one size, so that none is taken for another.
EXAMPLE_SIZES = {"batch": 2, "batch_size": 2, "seq": 5, "past": 7, "total": 12}
EXAMPLE_GRIDS = ((1, 4, 6), (2, 2, 2))  # height and width in merge blocks


def run(build: Build, out: Path) -> Mapping[str, object]:
    """Exports every target of the recipe; returns the number of nodes and of bound initializers a graph."""
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
    """One graph of one target, bound. Call under `patches.registry.applied`.

    Args:
        model: the empty model of `shortened(checkpoint)`, one layer of each kind.

    Raises:
        WeightError: an initializer is neither a checkpoint tensor nor a recomputed buffer.
    """
    short = shortened(checkpoint)
    few = next(one for one in components(short, target.runtime) if one.name == component.name)
    traced = trace(short, model, target, few)
    if component.name not in KINDS:
        return traced
    return unroll(traced, KINDS[component.name](checkpoint), component)


def trace(checkpoint: Checkpoint, model: Any, target: Target, component: Component) -> BoundGraph:
    """The graph of `model` as it is, marks of its layers included, bound.

    Raises:
        WeightError: an initializer is neither a checkpoint tensor nor a recomputed buffer.
    """
    import torch

    # The exporter warns on every graph that torchvision's operators are not there; nothing here uses them.
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
    """The decoder takes its past as one list; every other port is an argument of its own."""
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
    """Names and shapes of the ports as the contract spells them."""
    for values, ports in ((model.graph.inputs, component.inputs), (model.graph.outputs, component.outputs)):
        assert len(values) == len(ports), f"{component.name}: {len(values)} ports traced, {len(ports)} in the contract"
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
                    f"initializer {name} has no tensor in the checkpoint",
                    expected=tensor,
                    found="no such tensor",
                )
            assert value.shape is not None
            bindings.append(Binding(name, tensor, "float32", tuple(value.shape.numpy())))
        elif "." in name and not name.endswith(RECOMPUTED) and TRACED_CONSTANT not in name:
            raise WeightError(f"initializer {name} is neither a checkpoint tensor nor one of {', '.join(RECOMPUTED)}")
    return bindings
