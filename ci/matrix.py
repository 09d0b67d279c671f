"""Verify the miniature on the oldest and the newest supported releases: `python -m ci.matrix`.

Builds and verifies every combination of transformers, onnxruntime and onnxruntime-genai (lower bounds of
pyproject.toml, and constraints.txt) for both targets, and runs the newest's bundles on the oldest releases. A verdict
counts only if its report names the requested releases. Prints a Markdown table; exits with 1 if a combination fails,
naming the smallest sets of releases that fail.

Combinations share the stages that do not depend on a runtime, by their stage keys; the table shows what ran.
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
    """Releases to run.

    Args:
        releases: axis → release that builds, or that verifies the bundles of `builder`.
        builder: release of transformers whose bundles are verified; None if this combination builds its own.
    """

    releases: Releases
    builder: str | None = None


@dataclass(frozen=True)
class Row:
    """Result of a combination.

    Args:
        ran: the stages that ran, or the command.
        verdict: `passed`, `failed` (a gate fails) or `error` (the build or verification stopped).
        found: the first difference, or the error's first line; "" if it passed.
        seconds: wall time.
    """

    combination: Combination
    ran: str
    verdict: str
    found: str
    seconds: float = 0.0


def axes(root: Path = ROOT) -> dict[str, tuple[str, ...]]:
    """Return axis → supported releases, see `supported`."""
    return {axis: supported(axis, root) for axis in AXES}


def supported(distribution: str, root: Path = ROOT) -> tuple[str, ...]:
    """Return the newest and the oldest release; one release if they are the same."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["build"])]
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    exact = [Requirement(line) for line in lines if line and not line.startswith("#")]
    (oldest,) = (_release(bound, ">=") for bound in declared if canonicalize_name(bound.name) == distribution)
    (newest,) = (_release(pin, "==") for pin in exact if canonicalize_name(pin.name) == distribution)
    return (newest,) if Version(oldest) == Version(newest) else (newest, oldest)


def _release(requirement: Requirement, operator: str) -> str:
    """Return the version after the operator, padded to three numbers."""
    (written,) = (part.version for part in requirement.specifier if part.operator == operator)
    return ".".join([*written.split("."), "0", "0"][: max(3, written.count(".") + 1)])


def planned(releases: Mapping[str, Sequence[str]]) -> list[Combination]:
    """Return all combinations, grouped by shared builds, and the newest's bundles on the oldest releases."""
    every = [Combination(dict(zip(releases, chosen, strict=True))) for chosen in product(*releases.values())]
    newest, oldest = every[0], every[-1]
    if newest == oldest:
        return every
    return [newest, replace(oldest, builder=newest.releases["transformers"]), *every[1:]]


def run(combination: Combination, outputs: Path) -> Row:
    """Build and verify, or verify existing bundles, with the releases of the combination.

    Args:
        outputs: folder for an output folder per release of transformers.
    """
    started = time.monotonic()
    try:
        other = {name: release for name, release in combination.releases.items() if release != version(name)}
        name = "-".join(f"{axis}-{release}" for axis, release in other.items())
        executable = with_releases(ENVIRONMENTS / name, other) if other else Path(sys.executable)
    except MissingPackageError as error:
        return Row(combination, "nothing", "error", f"{error.what}: {error.found}")
    output = outputs / (combination.builder or combination.releases["transformers"])
    row = (_verified if combination.builder else _built)(combination, executable, output)
    # Paths of temporary folders are meaningless in a stored table.
    return replace(row, found=row.found.replace(f"{outputs}{os.sep}", ""), seconds=time.monotonic() - started)


def _built(combination: Combination, executable: Path, output: Path) -> Row:
    payload = _run_json(executable, "build", "--output", output)
    stages = payload.get("stages", [])
    ran = [stage["stage"] for stage in stages if stage["state"] == "run"]
    words = "everything" if ran and len(ran) == len(stages) else ", ".join(ran) or "build"
    if not payload["ok"]:
        return Row(combination, words, _kind(payload), _words(payload))
    reports = [Path(bundle) / "evidence" / "parity.json" for bundle in payload["bundles"].values()]
    return _judged(combination, words, [json.loads(report.read_text(encoding="utf-8")) for report in reports])


def _verified(combination: Combination, executable: Path, output: Path) -> Row:
    bundles = sorted(manifest.parent for manifest in (output / "8-bundle").glob("*/manifest.json"))
    reports = []
    for bundle in bundles:
        payload = _run_json(executable, "verify", bundle, "--reference", MINIATURE)
        if "gates" not in payload:
            return Row(combination, "verify", _kind(payload), f"{bundle.name}: {_words(payload)}")
        reports.append(payload)
    return _judged(combination, "verify", reports)


def _judged(combination: Combination, ran: str, reports: Sequence[Mapping[str, Any]]) -> Row:
    """Return the worst verdict of the targets' reports; a report on other releases is an error."""
    if not reports:
        return Row(combination, ran, "error", "no bundle was built")
    for report in reports:
        used = report["facts"]["versions"]
        releases = combination.releases.items()
        if unexpected := {name: used.get(name) for name, release in releases if used.get(name) != release}:
            return Row(combination, ran, "error", f"{report['target']} was verified on {unexpected}")
    failing = [report for report in reports if report["verdict"] != "passed"]
    found = "; ".join(f"{report['target']}: {report['first difference'] or report['not run']}" for report in failing)
    return Row(combination, ran, "failed" if failing else "passed", found)


def _run_json(executable: Path, *arguments: object) -> dict[str, Any]:
    """Run a command with --json and return its object; without one, an error with the last line of stderr."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [str(executable), "-m", "builder", *map(str, arguments), "--json"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        payload: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError:
        last = ([line for line in done.stderr.splitlines() if line.strip()] or ["no output"])[-1]
        return {"ok": False, "what": f"ended with {done.returncode}: {last}"}
    return payload


def _kind(payload: Mapping[str, Any]) -> str:
    return "failed" if payload.get("error") == "VerificationError" else "error"


def _words(payload: Mapping[str, Any]) -> str:
    words = payload["what"] if not payload.get("found") else f"{payload['what']}: {payload['found']}"
    return str(words).splitlines()[0]


def blamed(rows: Iterable[Row]) -> list[str]:
    """Return the smallest sets of releases that always fail, as `transformers 5.18.0 with onnxruntime 1.30.0`.

    Axes with one release are left out, unless every combination fails.
    """
    tried = list(rows)
    broken = [row for row in tried if row.verdict != "passed"]
    if len(broken) == len(tried):
        return [EVERY]
    varying = [axis for axis in AXES if len({row.combination.releases[axis] for row in tried}) > 1]
    found: list[dict[str, str]] = []
    for count in range(1, len(varying) + 1):
        for row, some in product(broken, combinations(varying, count)):
            suspect = {axis: row.combination.releases[axis] for axis in some}
            using = [each for each in tried if suspect.items() <= each.combination.releases.items()]
            smaller = any(known.items() <= suspect.items() for known in found)
            if not smaller and all(each.verdict != "passed" for each in using):
                found.append(suspect)
    names = [" with ".join(f"{axis} {release}" for axis, release in suspect.items()) for suspect in found]
    # If the same releases pass with their own bundles, the bundle of the other release is at fault.
    mixed = [row for row in broken if row.combination.builder and not _explained(row, found)]
    return names + [
        f"a bundle built with transformers {row.combination.builder} on {_releases(row.combination)}" for row in mixed
    ]


def _explained(row: Row, found: Sequence[Mapping[str, str]]) -> bool:
    return any(suspect.items() <= row.combination.releases.items() for suspect in found)


def _releases(combination: Combination) -> str:
    return ", ".join(f"{axis} {release}" for axis, release in combination.releases.items())


def table(rows: Sequence[Row], releases: Mapping[str, Sequence[str]]) -> str:
    """Render the rows as Markdown."""
    about = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, torch {version('torch')}"
    lines = [
        "# The miniature on the supported releases",
        "",
        f"Generated by `make matrix`. {about}; all other packages as in constraints.txt.",
        "",
        "| axis | newest (constraints.txt) | oldest (pyproject.toml) |",
        "|---|---|---|",
        *(
            f"| {axis} | {some[0]} | {some[1] if len(some) > 1 else 'the same release'} |"
            for axis, some in releases.items()
        ),
        "| torch | pinned here | not run here: a manually started job of .github/workflows/ci.yml |",
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
    """Run the matrix; return 1 if a combination fails."""
    parser = argparse.ArgumentParser(prog="python -m ci.matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    releases = axes()
    rows = []
    with TemporaryDirectory() as outputs:
        for combination in planned(releases):
            rows.append(run(combination, Path(outputs)))
            outcome = f"{rows[-1].verdict} ({rows[-1].ran}, {rows[-1].seconds:.0f} s) {rows[-1].found}"
            print(f"{_releases(combination)}: {outcome}", file=sys.stderr, flush=True)
    text = table(rows, releases)
    print(text)
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(text, encoding="utf-8")
    return 0 if all(row.verdict == "passed" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
