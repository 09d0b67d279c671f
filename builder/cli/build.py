"""The commands `build` and `explain`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from builder.cli.arguments import Checkpoint, DryRun, Force, Json, Memory, Output, RecipeOption, Rehash, Until
from builder.cli.exit_codes import emit, reported
from builder.targets.recipe_file import DEFAULT

if TYPE_CHECKING:
    from builder.bundle.table import Row
    from builder.stages.engine.build import Build
    from builder.stages.engine.execute import Step
    from builder.stages.engine.output_folder import Record


def build(
    checkpoint: Checkpoint = None,
    recipe: RecipeOption = DEFAULT,
    output: Output = None,
    until: Until = None,
    force: Force = None,
    rehash: Rehash = False,
    memory: Memory = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Build, verify and bundle a checkpoint; the last line printed is the path of the first target's bundle."""
    with reported(as_json):
        from builder.bundle import table as bundle_table
        from builder.cli.progress_bars import watching
        from builder.stages.engine.execute import execute
        from builder.util.console_table import show

        plan = _prepared(checkpoint, recipe, output, until, force or [], rehash, memory)
        _refuse_what_cannot_fit(plan, until, force or [], shown=dry_run, as_json=as_json)
        if dry_run:
            return
        with watching(plan) as on_event:
            done = execute(plan, until, force or [], on_event)
        if all(step.state == "cached" for step, _ in done):
            print("nothing to run: nothing changed", file=sys.stderr)
        last = plan.folder(done[-1][0].stage.name)
        complete = done[-1][0].stage == plan.stages[-1]
        bundles = {target.runtime: str(last / target.runtime) for target in plan.recipe.targets} if complete else {}
        table = _table(plan, bundles)
        if as_json:
            results = {"bundles": bundles, "table": bundle_table.as_dicts(table)}
            emit({**_head(plan), **results, "stages": [_stage_facts(plan, step, record) for step, record in done]})
            return
        for _, record in done:
            if report := record.facts.get("report"):
                print(report)
        _show_reports(plan, [step.stage.name for step, _ in done])
        if len(table) > 1:
            show(*bundle_table.renderables(table))
        print(next(iter(bundles.values()), last))


def explain(
    checkpoint: Checkpoint = None,
    recipe: RecipeOption = DEFAULT,
    output: Output = None,
    until: Until = None,
    force: Force = None,
    rehash: Rehash = False,
    as_json: Json = False,
) -> None:
    """Print which stages `build` would run with the same arguments, and why; build nothing."""
    with reported(as_json):
        from builder.cli.progress_bars import line
        from builder.stages.engine.execute import plan

        asked = _prepared(checkpoint, recipe, output, until, force or [], rehash)
        steps = plan(asked, until, force or [])
        if as_json:
            stages = [{"stage": step.stage.name, "state": step.state, "why": step.why} for step in steps]
            emit({**_head(asked), "stages": stages})
            return
        for step in steps:
            print(line(asked, step))


def _prepared(
    checkpoint: str | None,
    recipe: str,
    output: Path | None,
    until: str | None,
    force: list[str],
    rehash: bool,
    memory: int | None = None,
) -> Build:
    from builder.stages.engine.build import STAGES
    from builder.stages.engine.prepare import prepared

    names = [stage.name for stage in STAGES]
    late = [name for name in force if until is not None and names.index(name) > names.index(until)]
    if late:
        raise typer.BadParameter(f"{late[0]} comes after --until {until}", param_hint="--force")
    return prepared(checkpoint, recipe, output, rehash=rehash, settle_again="fetch" in force, memory=memory)


def _refuse_what_cannot_fit(build: Build, until: str | None, force: list[str], *, shown: bool, as_json: bool) -> None:
    """Raise where the build cannot fit; with `shown`, print the estimate."""
    from builder.stages.engine.execute import plan

    steps = plan(build, until, force)
    if not shown and all(step.state == "cached" for step in steps):
        return
    from builder.cli.estimate_table import renderables
    from builder.stages.engine.dry_run import estimated
    from builder.util.console_table import show

    estimate = estimated(build, steps)
    if shown and not as_json:
        show(*renderables(estimate))
    estimate.refuse()
    if shown and as_json:
        emit({**_head(build), "estimate": estimate.as_dict()})


def _show_reports(build: Build, stages: Sequence[str]) -> None:
    """Print a table of gates for each target."""
    from builder.util.console_table import show
    from builder.verify.report.console import renderables
    from builder.verify.report.formats import read_report

    for target in build.recipe.targets if "verify" in stages else ():
        show(*renderables(read_report(build.folder("verify") / target.runtime)))


def _head(build: Build) -> dict[str, Any]:
    return {"ok": True, "checkpoint": str(build.source), "output": str(build.output)}


def _table(build: Build, bundles: Mapping[str, str]) -> list[Row]:
    """One row per bundle, also written into the output folder's `evidence/`."""
    from builder.bundle import table as bundle_table

    found = bundle_table.rows([Path(folder) for folder in bundles.values()])
    if found:
        bundle_table.write(found, build.output)
    return found


def _stage_facts(build: Build, step: Step, record: Record) -> dict[str, Any]:
    return {
        "stage": step.stage.name,
        "state": step.state,
        "why": step.why,
        "folder": str(build.folder(step.stage.name)),
        "key": record.key,
        **asdict(record.cost),
    }
