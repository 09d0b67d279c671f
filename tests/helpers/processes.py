"""The command line in a process of its own, as a user starts it: elsewhere, with other settings, from other folders.

In: arguments, and what is to be different from this process. Out: what it printed and how it ended; a copy of the
checkout, the digests of an output folder. Guaranteed: nothing is written into this checkout.
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
# What a checkout holds besides its files.
_LEFT_BY_USE = (".git", ".venv", ".node", ".cache", "outputs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
# What tells of one run, or of this machine, rather than of the artifacts. `verify` writes nothing but measurements.
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
        cwd: where it is started, so that `outputs/` is no one else's.
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
    """A copy of this checkout, as a clone would be."""
    return Path(shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*_LEFT_BY_USE)))


def artifacts(output: Path) -> Mapping[str, str]:
    """Relative path → SHA-256 of everything that a build must reproduce: all but evidence and records."""
    return {
        file.relative_to(output).as_posix(): sha256(file)
        for file in sorted(output.rglob("*"))
        if file.is_file() and not _RECORDS & set(file.relative_to(output).parts)
    }


def copied(output: Path, folder: Path) -> Path:
    """An output folder that a test may change: times and hard links stay as they are."""
    subprocess.run(["cp", "-a", str(output), str(folder)], check=True)
    return folder
