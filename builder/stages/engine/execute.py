"""Decide which stages have to run, and run them.

Each stage gets a folder, `1-fetch` … `8-bundle`, with its `stage.json`.

Guarantees: a stage runs if and only if something that its result depends on changed, or it was forced; each run states
its reason; a folder with a stage's name is complete.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from builder.stages.engine.build import Build, Stage
from builder.stages.engine.cache_key import UNKNOWN, Components, code_digests, plain, reasons
from builder.stages.engine.output_folder import (
    Record,
    claimed,
    damage,
    find_linkable,
    linked,
    part,
    put_in_place,
    read_record,
    recover,
    remove_part,
    sizes,
    unwritable,
    write_record,
)
from builder.util.cost import Meter
from builder.util.errors import MissingPackageError
from builder.util.versions import MISSING, version

CASES = ("calibration", "heldout")  # folders of cases next to a checkpoint
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})
_PERMISSION = frozenset({errno.EACCES, errno.EPERM})


@dataclass(frozen=True)
class Step:
    """A stage, and whether it has to run.

    Args:
        state: `link` where another output folder has the complete stage, in the folder `linkable`.
        why: the reason, empty if cached.
    """

    stage: Stage
    state: Literal["cached", "link", "run"]
    why: str
    components: Components
    record: Record | None = None
    linkable: Path | None = None

    @property
    def text(self) -> str:
        """`cached`, `link: …`, or `run: recipe.max_length changed (4096 → 2048)`."""
        return f"{self.state}: {self.why}" if self.why else self.state


@dataclass(frozen=True)
class Event:
    """Progress of `execute`: a step begins (record None) or ended."""

    step: Step
    record: Record | None = None


def plan(build: Build, until: str | None = None, force: Collection[str] = ()) -> list[Step]:
    """List what `execute` would do, in order, without writing or importing a stage."""
    steps: dict[str, Step] = {}
    for stage in wanted(build, until):
        steps[stage.name] = _step(build, stage, steps, force, lambda: _planned_architecture(build, steps.get("fetch")))
    return list(steps.values())


def execute(
    build: Build,
    until: str | None = None,
    force: Collection[str] = (),
    on_event: Callable[[Event], None] = lambda event: None,
) -> list[tuple[Step, Record]]:
    """Run the stages that have to run, up to and including `until`.

    Args:
        until: name of the last stage; None for all.
        force: names of stages to run although nothing changed; stages that read them run too.
        on_event: called when a step begins and when it ends.

    Returns:
        Each step with the record of its artifacts.

    Raises:
        OutputError: see `builder.stages.engine.output_folder.claimed`.
        MissingPackageError: a package that a stage needs is not installed (before any stage runs).
        BuildError: a stage failed; the folders of earlier stages are kept.
    """
    source = str(build.source)
    about = {"asked": build.requested or source, "checkpoint": source, "recipe": build.recipe.name}
    done: dict[str, tuple[Step, Record]] = {}
    with claimed(build.output, about):
        for stage in build.stages:
            recover(build.folder(stage.name))
        _require_packages(plan(build, until, force))
        for stage in wanted(build, until):
            steps = {name: step for name, (step, _) in done.items()}
            step = _step(build, stage, steps, force, lambda: build.checkpoint.config_digest)
            on_event(Event(step))
            after = {name: done[name][1].started for name in stage.inputs if name in done}
            record = step.record or _run(build, step, after)
            remove_part(build.folder(stage.name))
            done[stage.name] = step, record
            on_event(Event(step, record))
    return list(done.values())


def wanted(build: Build, until: str | None) -> tuple[Stage, ...]:
    """Return the stages up to and including `until`."""
    names = [stage.name for stage in build.stages]
    return build.stages[: names.index(until) + 1] if until else build.stages


def _step(
    build: Build,
    stage: Stage,
    earlier: Mapping[str, Step],
    force: Collection[str],
    architecture: Callable[[], str],
) -> Step:
    components = _components(build, stage, earlier, architecture)
    folder = build.folder(stage.name)
    try:
        record = read_record(folder)
    except ValueError:
        return Step(stage, "run", "record unreadable", components)
    if record is None:
        other = find_linkable(folder, components.key) if stage.shared and stage.name not in force else None
        if other is not None:
            return Step(stage, "link", f"same as in {other.parent.name}", components, linkable=other)
        return Step(stage, "run", "first time", components)
    if stage.name in force:
        return Step(stage, "run", "forced", components)
    why = reasons(record.components, components)
    why += [
        f"{name} was rebuilt"
        for name, step in earlier.items()
        if name in stage.inputs and f"{name} changed" not in why and _rebuilt(step, record.after.get(name))
    ]
    why += damage(folder, record)
    if not why:
        return Step(stage, "cached", "", components, record)
    shown = why[:3] + ([f"and {len(why) - 3} more"] if len(why) > 3 else [])
    return Step(stage, "run", ", ".join(shown), components)


def _rebuilt(step: Step, started: str | None) -> bool:
    return step.record is None or step.record.started != started


def _components(build: Build, stage: Stage, earlier: Mapping[str, Step], architecture: Callable[[], str]) -> Components:
    inputs: dict[str, str] = {}
    for name in stage.inputs:
        if name == "source":
            from builder.checkpoint.fingerprint import folder_fingerprint, hub_fingerprint

            local = build.source.folder is not None
            inputs |= (
                folder_fingerprint(build.checkpoint, rehash=build.rehash) if local else hub_fingerprint(build.source)
            )
        elif name in CASES:
            from builder.checkpoint.fingerprint import cases_fingerprint

            read = name == "heldout" or any(rule.search == "gptq" for rule in build.recipe.rules)
            inputs[name] = cases_fingerprint(build.source, name) if read else "not read"
        else:
            inputs[name] = architecture() if name == "config" else earlier[name].components.key
    return Components(
        recipe={name: plain(getattr(build.recipe, name)) for name in stage.fields},
        inputs=inputs,
        code=code_digests(stage.module_name, stage.files),
        packages={name: version(name) for name in stage.packages} | (_runtimes(build) if stage.runs_bundles else {}),
    )


def _runtimes(build: Build) -> dict[str, str]:
    """Map each target to the versions of its runtime, or to `not here`, where packages alone do not identify it."""
    from builder.targets.runners.registry import RUNTIMES

    found: dict[str, str] = {}
    for name in (target.runtime for target in build.recipe.targets):
        runtime = RUNTIMES[name]
        versions = ", ".join(f"{package} {number}" for package, number in sorted(runtime.versions().items()))
        here = "not here" if runtime.missing() else versions
        found |= {f"runtime of {name}": here} if here else {}
    return found


def _planned_architecture(build: Build, fetch: Step | None) -> str:
    """Return the config's digest; `UNKNOWN` until the stage `fetch` has downloaded it."""
    available = build.source.folder is not None or (fetch is not None and fetch.state == "cached")
    return build.checkpoint.config_digest if available else UNKNOWN


def _require_packages(steps: list[Step]) -> None:
    for step in steps:
        missing = [name for name, found in step.components.packages.items() if found == MISSING]
        if missing and step.state == "run":
            raise MissingPackageError(
                f"the stage {step.stage.name} needs {', '.join(missing)}",
                found=MISSING,
                next='pip install "qwen3vl-onnx[build]"; in a checkout: make setup',
            )


def _run(build: Build, step: Step, after: Mapping[str, str]) -> Record:
    """Run the stage in its `.part` folder and rename it into place; remove it where the disk is at fault."""
    folder = build.folder(step.stage.name)
    started, meter = datetime.now(UTC).isoformat(timespec="microseconds"), Meter()
    try:
        fresh = part(folder)
        facts = step.stage.run(build, fresh) if step.linkable is None else linked(step.linkable, fresh)
        record = Record(
            stage=step.stage.name,
            key=step.components.key,
            components=step.components,
            after=after,
            facts=facts,
            files=sizes(fresh),
            started=started,
            cost=meter.cost(),
        )
        write_record(fresh, record)
        put_in_place(fresh, folder)
    except OSError as error:
        if not _of_the_output(error, build.output):
            raise
        with suppress(OSError):
            remove_part(folder)
        raise unwritable(build.output, error) from error
    return record


def _of_the_output(error: OSError, output: Path) -> bool:
    """Whether the output folder's disk or permissions caused the error: stages write nowhere else."""
    named = [os.path.abspath(os.fsdecode(name)) for name in (error.filename, error.filename2) if name]
    inside = any(Path(name).is_relative_to(os.path.abspath(output)) for name in named)
    return error.errno in _DISK or (error.errno in _PERMISSION and inside)
