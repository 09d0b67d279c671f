"""`python -m ci.matrix`: the miniature, verified again on the oldest and the newest supported releases.

In: pyproject.toml (lower bounds) and constraints.txt (newest). Out: a Markdown table, and exit code 1 if a combination
broke, naming the releases that it takes to break it. Guaranteed: every combination of transformers, onnxruntime and
onnxruntime-genai is built and verified for both targets, and what was built by the newest is also run by the oldest; a
verdict counts only if the report itself names the releases that were asked for.

Stages whose result does not depend on a runtime are not run again where only a runtime differs: the stage keys decide,
and the table says what ran.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import combinations, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from builder.stages.engine.prepare import MINIATURE
from builder.util.errors import MissingPackageError
from ci.environments import with_releases

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".cache" / "matrix"
AXES = ("transformers", "onnxruntime", "onnxruntime-genai")
EVERY = "every combination"

Releases = Mapping[str, str]


@dataclass(frozen=True)
class Combination:
    """What is run.

    Args:
        releases: axis → release that builds, or that verifies `builder`'s bundles.
        builder: release of transformers whose build's bundles are verified; None where it builds itself.
    """

    releases: Releases
    builder: str | None = None


@dataclass(frozen=True)
class Row:
    """What came of it.

    Args:
        ran: the stages that ran, or the command.
        verdict: `passed`, `failed` (a gate does not hold) or `error` (it got no further).
        found: the first difference, or the error's first line; "" where it passed.
        seconds: of wall time.
    """

    combination: Combination
    ran: str
    verdict: str
    found: str
    seconds: float = 0.0


def axes(root: Path = ROOT) -> dict[str, tuple[str, ...]]:
    """Axis → its releases, newest first; one where the lower bound is the newest."""
    return {axis: supported(axis, root) for axis in AXES}


def supported(distribution: str, root: Path = ROOT) -> tuple[str, ...]:
    """The newest and the oldest release, or the one that is both."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [Requirement(one) for one in (*project["dependencies"], *project["optional-dependencies"]["build"])]
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    exact = [Requirement(line) for line in lines if line and not line.startswith("#")]
    (oldest,) = (_release(one, ">=") for one in declared if canonicalize_name(one.name) == distribution)
    (newest,) = (_release(one, "==") for one in exact if canonicalize_name(one.name) == distribution)
    return (newest,) if Version(oldest) == Version(newest) else (newest, oldest)


def _release(requirement: Requirement, operator: str) -> str:
    """The one version that is written behind the operator, with three numbers."""
    (written,) = (one.version for one in requirement.specifier if one.operator == operator)
    return ".".join([*written.split("."), "0", "0"][: max(3, written.count(".") + 1)])


def planned(releases: Mapping[str, Sequence[str]]) -> list[Combination]:
    """Every combination, those that share a build together; and the newest's bundles on the oldest of everything."""
    every = [Combination(dict(zip(releases, one, strict=True))) for one in product(*releases.values())]
    newest, oldest = every[0], every[-1]
    if newest == oldest:
        return every
    return [newest, replace(oldest, builder=newest.releases["transformers"]), *every[1:]]


def run(combination: Combination, outputs: Path) -> Row:
    """Build and verify, or verify bundles built before, with the releases of the combination.

    Args:
        outputs: takes one output folder a release of transformers.
    """
    started = time.monotonic()
    try:
        other = {name: one for name, one in combination.releases.items() if one != version(name)}
        name = "-".join(f"{axis}-{release}" for axis, release in other.items())
        executable = with_releases(ENVIRONMENTS / name, other) if other else Path(sys.executable)
    except MissingPackageError as error:
        return Row(combination, "nothing", "error", f"{error.what}: {error.found}")
    output = outputs / (combination.builder or combination.releases["transformers"])
    row = (_verified if combination.builder else _built)(combination, executable, output)
    # Where a temporary folder was says nothing in a table that is kept.
    return replace(row, found=row.found.replace(f"{outputs}{os.sep}", ""), seconds=time.monotonic() - started)


def _built(combination: Combination, executable: Path, output: Path) -> Row:
    payload = _told(executable, "build", "--output", output)
    stages = payload.get("stages", [])
    ran = [stage["stage"] for stage in stages if stage["state"] == "run"]
    words = "everything" if ran and len(ran) == len(stages) else ", ".join(ran) or "build"
    if not payload["ok"]:
        return Row(combination, words, _kind(payload), _words(payload))
    reports = [Path(bundle) / "evidence" / "parity.json" for bundle in payload["bundles"].values()]
    return _judged(combination, words, [json.loads(one.read_text(encoding="utf-8")) for one in reports])


def _verified(combination: Combination, executable: Path, output: Path) -> Row:
    bundles = sorted(one.parent for one in (output / "8-bundle").glob("*/manifest.json"))
    reports = []
    for bundle in bundles:
        payload = _told(executable, "verify", bundle, "--reference", MINIATURE)
        if "gates" not in payload:
            return Row(combination, "verify", _kind(payload), f"{bundle.name}: {_words(payload)}")
        reports.append(payload)
    return _judged(combination, "verify", reports)


def _judged(combination: Combination, ran: str, reports: Sequence[Mapping[str, Any]]) -> Row:
    """The worst of the targets' reports; one that ran on other releases is an error."""
    if not reports:
        return Row(combination, ran, "error", "no bundle was built")
    for report in reports:
        used = report["facts"]["versions"]
        if strange := {name: used.get(name) for name, one in combination.releases.items() if used.get(name) != one}:
            return Row(combination, ran, "error", f"{report['target']} was verified on {strange}")
    failing = [one for one in reports if one["verdict"] != "passed"]
    found = "; ".join(f"{one['target']}: {one['first difference'] or one['not run']}" for one in failing)
    return Row(combination, ran, "failed" if failing else "passed", found)


def _told(executable: Path, *arguments: object) -> dict[str, Any]:
    """What the command line says with --json; a process that died without a word is an error with its last line."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [str(executable), "-m", "builder", *map(str, arguments), "--json"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        payload: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError:
        last = ([line for line in done.stderr.splitlines() if line.strip()] or ["no word"])[-1]
        return {"ok": False, "what": f"ended with {done.returncode}: {last}"}
    return payload


def _kind(payload: Mapping[str, Any]) -> str:
    return "failed" if payload.get("error") == "VerificationError" else "error"


def _words(payload: Mapping[str, Any]) -> str:
    words = payload["what"] if not payload.get("found") else f"{payload['what']}: {payload['found']}"
    return str(words).splitlines()[0]


def blamed(rows: Iterable[Row]) -> list[str]:
    """The smallest sets of releases with which nothing passes: `transformers 5.18.0 with onnxruntime 1.30.0`.

    A release that is the only one of its axis tells nothing apart and is left out, unless everything broke.
    """
    tried = list(rows)
    broken = [row for row in tried if row.verdict != "passed"]
    if len(broken) == len(tried):
        return [EVERY]
    telling = [axis for axis in AXES if len({row.combination.releases[axis] for row in tried}) > 1]
    found: list[dict[str, str]] = []
    for count in range(1, len(telling) + 1):
        for row, some in product(broken, combinations(telling, count)):
            suspect = {axis: row.combination.releases[axis] for axis in some}
            with_it = [one for one in tried if suspect.items() <= one.combination.releases.items()]
            smaller = any(one.items() <= suspect.items() for one in found)
            if not smaller and all(one.verdict != "passed" for one in with_it):
                found.append(suspect)
    names = [" with ".join(f"{axis} {release}" for axis, release in one.items()) for one in found]
    # Where the same releases pass with bundles of their own, it is the bundle of another release that broke.
    mixed = [row for row in broken if row.combination.builder and not _explained(row, found)]
    return names + [
        f"a bundle built with transformers {row.combination.builder} on {_releases(row.combination)}" for row in mixed
    ]


def _explained(row: Row, found: Sequence[Mapping[str, str]]) -> bool:
    return any(one.items() <= row.combination.releases.items() for one in found)


def _releases(combination: Combination) -> str:
    return ", ".join(f"{axis} {release}" for axis, release in combination.releases.items())


def table(rows: Sequence[Row], releases: Mapping[str, Sequence[str]]) -> str:
    """Markdown: what was run where, and what came of it."""
    about = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, torch {version('torch')}"
    lines = [
        "# The miniature on the supported releases",
        "",
        f"Made by `make matrix`. {about}; everything else as in constraints.txt.",
        "",
        "| axis | newest (constraints.txt) | oldest (pyproject.toml) |",
        "|---|---|---|",
        *(
            f"| {axis} | {some[0]} | {some[1] if len(some) > 1 else 'the same release'} |"
            for axis, some in releases.items()
        ),
        "| torch | pinned here | not run here: a job of .github/workflows/ci.yml that is started by hand |",
        "",
        f"| {' | '.join(releases)} | bundle built with | what ran | verdict | first difference | s |",
        "|" + "---|" * (len(releases) + 4) + "--:|",
    ]
    for row in rows:
        used = " | ".join(row.combination.releases.values())
        built = row.combination.builder or row.combination.releases["transformers"]
        found = row.found.replace("|", "\\|") or "none"
        lines.append(f"| {used} | transformers {built} | {row.ran} | {row.verdict} | {found} | {row.seconds:.0f} |")
    return "\n".join([*lines, "", _conclusion(rows), ""])


def _conclusion(rows: Sequence[Row]) -> str:
    if all(row.verdict == "passed" for row in rows):
        return "Every combination passed."
    return "\n".join(f"Broken: {name}." for name in blamed(rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the matrix; 1 if something broke."""
    parser = argparse.ArgumentParser(prog="python -m ci.matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="where to write the table too")
    asked = parser.parse_args(arguments)
    releases = axes()
    rows = []
    with TemporaryDirectory() as outputs:
        for combination in planned(releases):
            rows.append(run(combination, Path(outputs)))
            said = f"{rows[-1].verdict} ({rows[-1].ran}, {rows[-1].seconds:.0f} s) {rows[-1].found}"
            print(f"{_releases(combination)}: {said}", file=sys.stderr, flush=True)
    text = table(rows, releases)
    print(text)
    if asked.write:
        asked.write.parent.mkdir(parents=True, exist_ok=True)
        asked.write.write_text(text, encoding="utf-8")
    return 0 if all(row.verdict == "passed" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
