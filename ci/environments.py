"""Virtual environments with other releases of a few packages, and everything else as here.

In: a folder, and distribution → release. Out: the Python of an environment there. Guaranteed: what it has of its own is
exactly those releases; all other packages are this environment's, used in place; nothing is installed twice.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

from builder.util.errors import MissingPackageError


def environment(folder: Path) -> Path:
    """The Python of a new virtual environment that reuses the packages of this one; its own go before them."""
    venv.create(folder, symlinks=True)
    reused = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own_packages(folder) / "reused.pth").write_text("\n".join(sorted(reused)) + "\n", encoding="utf-8")
    return folder / "bin" / "python"


def own_packages(folder: Path) -> Path:
    """The `site-packages` of the virtual environment in `folder`."""
    return Path(sysconfig.get_path("purelib", "venv", vars={"base": str(folder), "platbase": str(folder)}))


def with_releases(folder: Path, releases: Mapping[str, str]) -> Path:
    """The Python of an `environment` in `folder` that has these releases, without what they ask for.

    Args:
        folder: kept for the next time; of these releases only.
        releases: distribution → version.

    Raises:
        MissingPackageError: a release that cannot be installed here.
    """
    executable = environment(folder)
    own = own_packages(folder)
    there = {one.name: one.version for one in distributions(path=[str(own)])}
    wanted = [f"{name}=={version}" for name, version in releases.items() if there.get(name) != version]
    if wanted:
        options = ("--no-deps", "--disable-pip-version-check", "--quiet", "--upgrade", "--target", str(own))
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, *wanted], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise MissingPackageError(
                f"{', '.join(wanted)} cannot be installed",
                expected="a release for this platform and Python",
                found=(done.stderr.strip() or "pip said nothing").splitlines()[-1],
                next="give a release that pip finds for this platform and Python",
            )
    return executable
