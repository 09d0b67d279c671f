"""Stage 4: run each target's graph passes.

Guarantees: every pass of a target matched; only operators of the target's domains remain, and no path of the machine
that traced.
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
    """Optimize every graph, and return how often each pass matched."""
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
    """Run a graph's passes, and return it with the matches of each pass.

    Raises:
        PassError: a pass matched nowhere, or an operator is not in the target's domains.
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
            f"{target.runtime}/{name}.onnx contains operators outside the target's domains",
            expected=f"domains {sorted(allowed)}",
            found=", ".join(foreign),
        )
    used = {node.domain for node in traced.model.graph.all_nodes()} | {""}
    for domain in set(traced.model.graph.opset_imports) - used:
        del traced.model.graph.opset_imports[domain]
    rename(traced)
    return traced, matches
