"""Stage 7: compare every configured target with PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from builder.graph.external_data import DIGESTS
from builder.quantization.activation_ranges import MAGNITUDES
from builder.util.json_files import read_json
from builder.verify.quantized import LossLimits
from builder.verify.report.context import _STAGES, Context, _costs, _manifest_facts, _manifest_tables
from builder.verify.report.write import write
from builder.verify.whole import STORE, comparison, failed

if TYPE_CHECKING:
    from builder.stages.engine.build import Build


def run(build: Build, out: Path) -> Mapping[str, object]:
    """Verify every target; the report of a failed target stays in the stage's `.part` folder."""
    facts: dict[str, object] = {}
    recipe = build.recipe
    limits = None if recipe.limits is None else LossLimits(recipe.precision, recipe.provider, recipe.limits)
    compared = comparison(build.checkpoint, build.memory, build.output / STORE, terms=limits)
    for target in build.recipe.targets:
        report = compared(build.folder("configure") / target.runtime, target.runtime)
        if magnitudes := read_json(build.folder("quantize") / DIGESTS).get(MAGNITUDES):
            report = replace(report, facts={**report.facts, MAGNITUDES: magnitudes})
        write(report, out / target.runtime, of_build(build, target.runtime))
        if not report.ok:
            raise failed(report, out / target.runtime)
        facts[target.runtime] = {"verdict": report.verdict, "gates": len(report.gates), **report.facts}
    return facts


def of_build(build: Build, target: str) -> Context:
    """Describe the build for reports, before the manifest exists."""
    checkpoint, recipe = build.checkpoint, build.recipe
    attention = next(each.attention for each in recipe.targets if each.runtime == target)
    manifest = {
        "target": target,
        "attention": attention,
        "recipe": {"name": recipe.name, "precision": recipe.precision, "max_length": recipe.max_length},
        "checkpoint": {
            "name": checkpoint.name,
            "revision": checkpoint.revision,
            "config_sha256": checkpoint.config_digest,
        },
    }
    return Context(
        facts=_manifest_facts(manifest),
        tables=_manifest_tables(manifest),
        stages=_costs([(name, build.folder(name) / "stage.json") for name in _STAGES]),
    )
