"""Stage 4: run each target's graph passes.

In: traced graphs with bindings. Out: the same names, ready for weights. Guaranteed: every pass that a target lists has
matched, no operator outside the target's domains is left, and no path of the machine that traced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from builder.graph.binding import BoundGraph, load, save
from builder.graph.passes.registry import PASSES
from builder.graph.ports import RESIDUAL, components
from builder.targets.registry import TARGETS
from builder.util.errors import PassError

if TYPE_CHECKING:
    from pathlib import Path

    from builder.stages.engine.build import Build
    from builder.targets.recipe_file import Target


def run(build: Build, out: Path) -> Mapping[str, object]:
    """Returns how often each pass matched, a graph."""
    facts: dict[str, object] = {}
    for target in build.recipe.targets:
        for component in components(build.checkpoint, target.runtime):
            path = f"{target.runtime}/{component.file}"
            traced = load(build.folder("export") / path)
            optimized, matches = optimize(traced, target, component.name)
            save(optimized, out / path)
            facts[path] = matches
    return facts


def optimize(traced: BoundGraph, target: Target, name: str) -> tuple[BoundGraph, dict[str, int]]:
    """Runs the passes of one graph.

    Raises:
        PassError: a pass matched nowhere, or an operator is left that the target may not contain.
    """
    runtime = TARGETS[target.runtime]
    matches: dict[str, int] = {}
    for step in runtime.passes(name, target.attention == "fused"):
        outcome = PASSES[step](traced)
        if not outcome.matches:
            raise PassError(
                f"pass {step} matched nowhere in {target.runtime}/{name}.onnx",
                expected="at least one match",
                found="; ".join(list(dict.fromkeys(outcome.misses))[:3]) or "no candidate",
                next="run `python -m builder patches`: an upstream change alters what is traced",
            )
        traced, matches[step] = outcome.graph, outcome.matches
    RemoveUnusedNodesPass()(traced.model)
    foreign = sorted({operator(node) for node in traced.model.graph.all_nodes() if node.domain not in runtime.domains})
    if foreign:
        raise PassError(
            f"{target.runtime}/{name}.onnx contains operators that the target may not",
            expected=f"domains {sorted(runtime.domains)}",
            found=", ".join(foreign),
        )
    used = {node.domain for node in traced.model.graph.all_nodes()} | {""}
    for domain in set(traced.model.graph.opset_imports) - used:
        del traced.model.graph.opset_imports[domain]
    rename(traced)
    return traced, matches


def rename(bound: BoundGraph) -> None:
    """Numbers what has no name that anyone reads, and forgets axes that are expressions: the traced sizes made both."""
    graph = bound.model.graph
    ports = {value.name for value in (*graph.inputs, *graph.outputs)}
    read = (value for node in graph.all_nodes() for value in node.inputs if value is not None)
    constants = {
        id(v): v for v in read if v.is_initializer() and v.name not in bound.bindings and "." not in str(v.name)
    }
    for number, value in enumerate(constants.values()):
        value.name = f"constant_{number}"
    for number, node in enumerate(graph.all_nodes()):
        node.name = f"{node.op_type}_{number}"
        for index, value in enumerate(node.outputs):
            if value.name not in ports and not str(value.name).startswith(f"{RESIDUAL}."):
                value.name = f"{node.name}.{index}" if index else node.name
            if value.shape is not None:
                value.shape = ir.Shape(
                    [dim if str(dim).isidentifier() or isinstance(dim, int) else None for dim in value.shape]
                )


def operator(node: ir.Node) -> str:
    """`domain::Type`, or the type alone for standard operators."""
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type
