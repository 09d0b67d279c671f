"""`python -m bench.runtime`: how fast an artifact is, beside other artifacts of the same checkpoint and the machine.

In: a size, recipes of ours. Out: tables on stdout and in docs/bench-runtime.md, every figure in runtime.json in the
work folder. Guaranteed: who is absent, or fails, is a line that says why.
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
class Asked:
    """What the command line asks for, of one size."""

    folder: Path
    checkpoint: Path
    threads: int
    recipes: tuple[str, ...]
    bundles: tuple[Path, ...]
    skip: frozenset[str]
    llama: Path | None


@dataclass(frozen=True)
class Artifact:
    """A folder of onnxruntime-genai, and what gives it or raises `AbsentError`."""

    name: str
    ready: Callable[[], Path]
    ours: bool = True


def _known_size(name: str) -> str:
    if name not in SIZES:
        raise typer.BadParameter(f"no size is called {name!r}; they are: {', '.join(SIZES)}")
    return name


def _known_skips(names: list[str]) -> list[str]:
    if unknown := [name for name in names if name not in SKIPPABLE]:
        raise typer.BadParameter(f"nobody is called {unknown[0]!r}; they are: {', '.join(SKIPPABLE)}")
    return names


def main(
    size: Annotated[str, typer.Option(help="Dimensions of the checkpoint.", callback=_known_size)] = "2b",
    work: Annotated[Path, typer.Option(help="Takes checkpoint and artifacts.")] = ROOT / "outputs" / "bench",
    repeat: Annotated[int, typer.Option(min=1, help="Rounds.")] = 3,
    threads: Annotated[int, typer.Option(min=1)] = psutil.cpu_count(logical=False) or 1,
    ours: Annotated[list[str], typer.Option(help="A recipe; repeatable.")] = ["int4"],  # noqa: B006
    bundle: Annotated[list[Path], typer.Option(help="A `genai` bundle that is there, instead of recipes.")] = [],  # noqa: B006
    skip: Annotated[list[str], typer.Option(help=f"Of: {', '.join(SKIPPABLE)}.", callback=_known_skips)] = [],  # noqa: B006
    llama_folder: Annotated[Path | None, typer.Option("--llama", help="A build of llama.cpp.")] = None,
    patience: Annotated[float, typer.Option(help="Seconds to wait for an idle machine before each process.")] = 60,
    write: Annotated[bool, typer.Option(help="Write docs/bench-runtime.md.")] = True,
) -> None:
    """Measure artifacts of one synthetic checkpoint side by side."""
    folder = work.resolve() / size
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = write_synthetic(folder / "checkpoint", size)
    recipes = () if bundle or "ours" in skip else tuple(ours)
    asked = Asked(folder, checkpoint, threads, recipes, tuple(bundle), frozenset(skip), llama_folder)
    everyone = tuple(field(asked))
    outcomes = contest(everyone, Rules(repeat, patience, _say))
    result = Result(size, threads, repeat, tuple(one.name for one in artifacts(asked) if one.ours), everyone, outcomes)
    raw = {name: asdict(outcome) for name, outcome in outcomes.items()}
    (folder / "runtime.json").write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    text = section(result)
    if write:
        DOCUMENT.write_text(document({size: text}, DOCUMENT), encoding="utf-8")
    print(text)
    raise typer.Exit(int(any(one.absent or outcomes[one.name].failures for one in everyone)))


def field(asked: Asked) -> list[Contestant]:
    """Everyone who is to be measured, the fast ones first."""
    everyone = [contestants.machine(asked.threads)]
    for one in artifacts(asked):
        everyone += _both(one, asked)
    if "llama" not in asked.skip:
        everyone.append(_llama(asked))
    if "torch" not in asked.skip:
        kinds = [kind for kind in TORCH if not (kind[0] == "bfloat16" and "bf16" in asked.skip)]
        everyone += [contestants.pytorch(asked.checkpoint, *kind, asked.threads) for kind in kinds]
    return everyone


def artifacts(asked: Asked) -> list[Artifact]:
    """Ours, then theirs."""
    found = [Artifact(f"bundle {number}", one.resolve) for number, one in enumerate(asked.bundles, start=1)]
    for recipe in asked.recipes:
        stem = Path(recipe).stem
        found.append(
            Artifact(f"ours, {stem}", partial(folders.ours, asked.checkpoint, recipe, asked.folder / f"ours-{stem}"))
        )
    if "genai" not in asked.skip:
        out = asked.folder / "genai-builder-int4"
        found.append(Artifact(THEIRS, partial(folders.theirs, asked.checkpoint, out), ours=False))
    return found


def _both(one: Artifact, asked: Asked) -> list[Contestant]:
    """An artifact with its threads set, and as it comes."""
    _say(f"{one.name}: ready")
    ways = (asked.threads, None)
    try:
        folder = one.ready()
        linked = folders.with_threads(folder, asked.folder / "threads" / _file_name(one.name), asked.threads)
    except AbsentError as error:
        return [Contestant(named(one.name, threads), absent=str(error)) for threads in ways]
    if not one.ours:
        return [contestants.genai(named(one.name, way), linked if way else folder) for way in ways]
    return [contestants.bundle(named(one.name, way), linked if way else folder, way) for way in ways]


def _file_name(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def _llama(asked: Asked) -> Contestant:
    _say(f"{LLAMA}: ready")
    try:
        build = llama.somewhere(asked.llama, os.environ)
        model = llama.gguf(build, asked.checkpoint, asked.folder / "llama-Q4_0.gguf")
        return contestants.llama_cpp(LLAMA, build, model, asked.threads)
    except AbsentError as error:
        return Contestant(LLAMA, absent=str(error))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
