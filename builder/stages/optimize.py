"""Stage 4: run each target's graph passes.

In: traced graphs with bindings. Out: the same names, ready for weights. Guaranteed: every pass that a target lists has
matched, no operator outside the target's domains is left, and no path of the machine that traced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from onnx_ir.passes.common import RemoveUnusedNodesPass

from builder.graph.binding import BoundGraph, load, save
from builder.graph.naming import operator, rename
from builder.graph.passes.registry import PASSES
from builder.targets.graphs import GRAPHS, components, passes
from builder.util.errors import PassError

if TYPE_CHECKING:
    from pathlib import Path

    from builder.stages.engine.build import Build
    from builder.targets.recipe import Target


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
    allowed = GRAPHS[target.runtime].domains
    matches: dict[str, int] = {}
    for step in passes(name, target):
        outcome = PASSES[step](traced)
        if not outcome.matches:
            raise PassError(
                f"pass {step} matched nowhere in {target.runtime}/{name}.onnx",
                expected="at least one match",
                found="; ".join(list(dict.fromkeys(outcome.misses))[:3]) or "no candidate",
                next="run `qwen3vl-onnx patches`: an upstream change alters what is traced",
            )
        traced, matches[step] = outcome.graph, outcome.matches
    RemoveUnusedNodesPass()(traced.model)
    foreign = sorted({operator(node) for node in traced.model.graph.all_nodes() if node.domain not in allowed})
    if foreign:
        raise PassError(
            f"{target.runtime}/{name}.onnx contains operators that the target may not",
            expected=f"domains {sorted(allowed)}",
            found=", ".join(foreign),
        )
    used = {node.domain for node in traced.model.graph.all_nodes()} | {""}
    for domain in set(traced.model.graph.opset_imports) - used:
        del traced.model.graph.opset_imports[domain]
    rename(traced)
    return traced, matches
