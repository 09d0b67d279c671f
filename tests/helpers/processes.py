"""Run the command line in a separate process, as users do: with other settings, from other folders.

Nothing is written into this checkout.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from builder.stages.engine.output_folder import EVIDENCE, LOCK, MARKER, RECORD
from builder.util.files import sha256

ROOT = Path(__file__).parents[2]
# Generated folders of a checkout.
_LEFT_BY_USE = (".git", ".venv", ".node", ".cache", "outputs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
# Files that describe a run or a machine, not the artifacts. `verify` writes only measurements.
_RECORDS = frozenset({LOCK, MARKER, RECORD, "checkpoint.json", EVIDENCE, "7-verify"})


def python(
    *arguments: object,
    cwd: Path,
    root: Path | None = ROOT,
    executable: Path | str = sys.executable,
    settings: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run Python with `arguments`.

    Args:
        cwd: working directory, so that `outputs/` is not shared.
        root: the checkout whose packages are imported; None for those that are installed.
        executable: which Python.
        settings: environment variables that are to be different.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if root is not None:
        environment["PYTHONPATH"] = str(root)
    return subprocess.run(
        [str(executable), *map(str, arguments)],
        cwd=cwd,
        env={**environment, **(settings or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def checkout(folder: Path) -> Path:
    """Copy this checkout as a clone would."""
    return Path(shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*_LEFT_BY_USE)))


def artifacts(output: Path) -> Mapping[str, str]:
    """Relative path → SHA-256 of everything that a build must reproduce: all but evidence and records."""
    return {
        file.relative_to(output).as_posix(): sha256(file)
        for file in sorted(output.rglob("*"))
        if file.is_file() and not _RECORDS & set(file.relative_to(output).parts)
    }


def copied(output: Path, folder: Path) -> Path:
    """Copy an output folder, with times and hard links, for a test to change."""
    subprocess.run(["cp", "-a", str(output), str(folder)], check=True)
    return folder
