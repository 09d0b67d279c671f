"""Compare several bundles in one table: runtime, and verification results.

All values are read from each bundle's manifest and evidence; nothing is computed or run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from builder.bundle.layout import EVIDENCE, MANIFEST, check_bundle
from builder.targets.notes import NOTES
from builder.targets.runners.registry import RUNTIMES
from builder.util.console_table import console_table
from builder.util.errors import BundleError
from builder.util.files import write_text
from builder.util.json_files import read_json
from builder.util.units import size

PARITY, WRITTEN = "parity.json", "bundles"
COLUMNS = ("bundle", "runtime", "verdict", "cases", "tokens equal", "task", "size", "")
RUN = "run"
NONE = "–"


@dataclass(frozen=True)
class Row:
    """One bundle.

    Args:
        runtime: the runtime that ran it, with its version.
        verdict: of its verification.
        cases: number of cases whose tokens were compared.
        tokens: number of tokens compared.
        equal: number of tokens before the first difference in each case.
        task: held-out accuracy, of the bundle and of PyTorch.
        bytes: size of all files but the evidence.
        status: `run`, or `not run here, because …`.
        fp32_copy: whether the tokens are those of the bundle's fp32 copy, exact even if the bundle is not.
    """

    target: str
    folder: str
    runtime: str
    verdict: str
    cases: int
    tokens: int
    equal: int
    task: str | None
    bytes: int
    status: str
    fp32_copy: bool = False

    @property
    def cells(self) -> tuple[str, ...]:
        """Text for each of `COLUMNS`."""
        tokens = f"{self.equal} / {self.tokens}{', its fp32 copy' * self.fp32_copy}" if self.tokens else NONE
        cases = str(self.cases) if self.tokens else NONE
        return (
            self.target,
            self.runtime,
            self.verdict,
            cases,
            tokens,
            self.task or NONE,
            size(self.bytes),
            self.status,
        )


def bundles_in(folders: Sequence[Path]) -> list[Path]:
    """Return the given bundles, and all bundles in the given output folders of builds.

    Raises:
        BundleError: a folder is neither.
    """
    found: list[Path] = []
    for folder in folders:
        if (folder / MANIFEST).is_file():
            found.append(folder)
            continue
        inside = sorted(path.parent for path in folder.glob(f"8-bundle/*/{MANIFEST}"))
        if not inside:
            raise BundleError(
                f"{folder} contains no bundles",
                expected="a bundle, or an output folder of `qwen3vl-onnx build`",
                next="qwen3vl-onnx build --recipe fp32-everywhere",
            )
        found += inside
    return found


def rows(bundles: Sequence[Path]) -> list[Row]:
    """Return a row per bundle, in order.

    Raises:
        BundleError: a folder is not a bundle, or was never verified.
    """
    return [_row(bundle) for bundle in bundles]


def _row(bundle: Path) -> Row:
    target, manifest = check_bundle(bundle), read_json(bundle / MANIFEST)
    path = bundle / EVIDENCE / PARITY
    if not path.is_file():
        raise BundleError(
            f"{bundle} was never verified",
            expected=f"{EVIDENCE}/{PARITY} in it",
            next=f"qwen3vl-onnx verify {bundle} --reference CHECKPOINT",
        )
    parity = read_json(path)
    facts, not_run = parity.get("facts", {}), parity.get("not run", {})
    tokens, task = facts.get("tokens", {}), facts.get("task", {})
    why = not_run.get("tokens") or not_run.get("generated tokens")
    return Row(
        target,
        str(bundle),
        _runtime(target, facts.get("versions", {})),
        parity["verdict"],
        int(tokens.get("cases", 0)),
        int(tokens.get("compared", 0)),
        int(tokens.get("equal", 0)),
        f"{task['ONNX']} (PyTorch {task['PyTorch']})" if {"ONNX", "PyTorch"} <= task.keys() else None,
        sum(int(file["size"]) for file in manifest.get("files", {}).values()),
        f"not run here, because {why}" if why else RUN,
        fp32_copy="quality" in facts,
    )


def _runtime(target: str, versions: Mapping[str, str]) -> str:
    """Return the package that runs the target, with its version; else the versions that its runner reports."""
    known = NOTES.get(target)
    first = known.packages[0] if known and known.packages else target
    if first in versions:
        return f"{first} {versions[first]}"
    own = RUNTIMES[target].versions() if target in RUNTIMES else {}
    return ", ".join(f"{name} {versions.get(name, own[name])}" for name in own) or first


def renderables(found: Sequence[Row]) -> Iterator[RenderableType]:
    """Yield a table for the console, then the long cells as lines."""
    shown = [index for index, name in enumerate(COLUMNS) if name not in ("runtime", "")]
    headings = [COLUMNS[index] for index in shown]
    rows = ([row.cells[index] for index in shown] for row in found)
    title = "Bundles, each in its own runtime, against PyTorch"
    yield console_table(title, headings, rows, right=("cases", "tokens equal", "size"))
    for row in found:
        yield f"{row.target}: {row.runtime}{'' if row.status == RUN else f', {row.status}'}"


def markdown(found: Sequence[Row]) -> str:
    """Format the table for a README or a comment."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row.cells)} |" for row in found]
    return "\n".join(lines) + "\n"


def as_dicts(found: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows for JSON."""
    return [asdict(row) for row in found]


def write(found: Sequence[Row], output: Path) -> None:
    """Write `evidence/bundles.md` and `.json` in an output folder."""
    folder = output / EVIDENCE
    folder.mkdir(exist_ok=True)
    write_text(folder / f"{WRITTEN}.md", markdown(found))
    write_text(folder / f"{WRITTEN}.json", json.dumps(as_dicts(found), indent=1, ensure_ascii=False) + "\n")
