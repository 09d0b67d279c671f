"""Compare the speed of artifacts of one checkpoint: `python -m bench.runtime`.

Writes tables to stdout and docs/bench-runtime.md, and all figures to runtime.json in the work folder. A contestant that
is missing or fails is a line with the reason.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import psutil
import typer

from bench.measure import ROOT
from bench.runtime import contestants, folders, llama
from bench.runtime.claims import LLAMA, THEIRS, named
from bench.runtime.contest import Rules, contest
from bench.runtime.contestants import Contestant
from bench.runtime.document import Result, document, section
from bench.runtime.llama import AbsentError
from bench.synthetic import SIZES, write_synthetic

DOCUMENT = ROOT / "docs" / "bench-runtime.md"
TORCH = (("float32", "sdpa"), ("float32", "eager"), ("bfloat16", "sdpa"), ("bfloat16", "eager"))
SKIPPABLE = ("ours", "genai", "llama", "torch", "bf16")


@dataclass(frozen=True)
class Options:
    """Options of the command line, for one size."""

    folder: Path
    checkpoint: Path
    threads: int
    recipes: tuple[str, ...]
    bundles: tuple[Path, ...]
    skip: frozenset[str]
    llama: Path | None


@dataclass(frozen=True)
class Artifact:
    """A folder for onnxruntime-genai; `ready` returns its path or raises `AbsentError`."""

    name: str
    ready: Callable[[], Path]
    ours: bool = True


def _known_size(name: str) -> str:
    if name not in SIZES:
        raise typer.BadParameter(f"unknown size {name!r}; expected one of: {', '.join(SIZES)}")
    return name


def _known_skips(names: list[str]) -> list[str]:
    if unknown := [name for name in names if name not in SKIPPABLE]:
        raise typer.BadParameter(f"unknown contestant {unknown[0]!r}; expected one of: {', '.join(SKIPPABLE)}")
    return names


def main(
    size: Annotated[str, typer.Option(help="Dimensions of the checkpoint.", callback=_known_size)] = "2b",
    work: Annotated[Path, typer.Option(help="Folder for checkpoint and artifacts.")] = ROOT / "outputs" / "bench",
    repeat: Annotated[int, typer.Option(min=1, help="Rounds.")] = 3,
    threads: Annotated[int, typer.Option(min=1)] = psutil.cpu_count(logical=False) or 1,
    ours: Annotated[list[str], typer.Option(help="A recipe of ours; repeatable.")] = ["int4"],  # noqa: B006
    bundle: Annotated[list[Path], typer.Option(help="An existing `genai` bundle, in place of recipes.")] = [],  # noqa: B006
    skip: Annotated[list[str], typer.Option(help=f"One of: {', '.join(SKIPPABLE)}.", callback=_known_skips)] = [],  # noqa: B006
    llama_folder: Annotated[Path | None, typer.Option("--llama", help="A build of llama.cpp.")] = None,
    patience: Annotated[float, typer.Option(help="Seconds to wait for an idle machine before each process.")] = 60,
    write: Annotated[bool, typer.Option(help="Write docs/bench-runtime.md.")] = True,
) -> None:
    """Measure artifacts of one synthetic checkpoint side by side."""
    folder = work.resolve() / size
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = write_synthetic(folder / "checkpoint", size)
    recipes = () if bundle or "ours" in skip else tuple(ours)
    options = Options(folder, checkpoint, threads, recipes, tuple(bundle), frozenset(skip), llama_folder)
    everyone = tuple(field(options))
    outcomes = contest(everyone, Rules(repeat, patience, _log))
    names = tuple(artifact.name for artifact in artifacts(options) if artifact.ours)
    result = Result(size, threads, repeat, names, everyone, outcomes)
    raw = {name: asdict(outcome) for name, outcome in outcomes.items()}
    (folder / "runtime.json").write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    text = section(result)
    if write:
        DOCUMENT.write_text(document({size: text}, DOCUMENT), encoding="utf-8")
    print(text)
    raise typer.Exit(int(any(each.absent or outcomes[each.name].failures for each in everyone)))


def field(options: Options) -> list[Contestant]:
    """Return all contestants, fast ones first."""
    everyone = [contestants.machine(options.threads)]
    for artifact in artifacts(options):
        everyone += _both(artifact, options)
    if "llama" not in options.skip:
        everyone.append(_llama(options))
    if "torch" not in options.skip:
        kinds = [kind for kind in TORCH if not (kind[0] == "bfloat16" and "bf16" in options.skip)]
        everyone += [contestants.pytorch(options.checkpoint, *kind, options.threads) for kind in kinds]
    return everyone


def artifacts(options: Options) -> list[Artifact]:
    """Return our artifacts, then theirs."""
    found = [Artifact(f"bundle {number}", path.resolve) for number, path in enumerate(options.bundles, start=1)]
    for recipe in options.recipes:
        stem = Path(recipe).stem
        found.append(
            Artifact(
                f"ours, {stem}", partial(folders.ours, options.checkpoint, recipe, options.folder / f"ours-{stem}")
            )
        )
    if "genai" not in options.skip:
        out = options.folder / "genai-builder-int4"
        found.append(Artifact(THEIRS, partial(folders.theirs, options.checkpoint, out), ours=False))
    return found


def _both(artifact: Artifact, options: Options) -> list[Contestant]:
    """Return an artifact with its threads set, and with default threads."""
    _log(f"{artifact.name}: ready")
    ways = (options.threads, None)
    try:
        folder = artifact.ready()
        linked = folders.with_threads(folder, options.folder / "threads" / _file_name(artifact.name), options.threads)
    except AbsentError as error:
        return [Contestant(named(artifact.name, threads), absent=str(error)) for threads in ways]
    if not artifact.ours:
        return [contestants.genai(named(artifact.name, way), linked if way else folder) for way in ways]
    return [contestants.bundle(named(artifact.name, way), linked if way else folder, way) for way in ways]


def _file_name(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def _llama(options: Options) -> Contestant:
    _log(f"{LLAMA}: ready")
    try:
        build = llama.somewhere(options.llama, os.environ)
        model = llama.gguf(build, options.checkpoint, options.folder / "llama-Q4_0.gguf")
        return contestants.llama_cpp(LLAMA, build, model, options.threads)
    except AbsentError as error:
        return Contestant(LLAMA, absent=str(error))


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
