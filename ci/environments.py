"""Create virtual environments with other releases of a few packages, reusing all other packages of this environment."""

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
    """Create a virtual environment whose own packages take precedence over this environment's; return its Python."""
    venv.create(folder, symlinks=True)
    reused = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own_packages(folder) / "reused.pth").write_text("\n".join(sorted(reused)) + "\n", encoding="utf-8")
    return folder / "bin" / "python"


def own_packages(folder: Path) -> Path:
    """Return the `site-packages` of the virtual environment in `folder`."""
    return Path(sysconfig.get_path("purelib", "venv", vars={"base": str(folder), "platbase": str(folder)}))


def with_releases(folder: Path, releases: Mapping[str, str]) -> Path:
    """Create an `environment` with these releases, without their dependencies, and return its Python.

    Args:
        folder: reused by later calls; must be used for these releases only.
        releases: distribution → version.

    Raises:
        MissingPackageError: a release cannot be installed here.
    """
    executable = environment(folder)
    own = own_packages(folder)
    installed = {package.name: package.version for package in distributions(path=[str(own)])}
    wanted = [f"{name}=={version}" for name, version in releases.items() if installed.get(name) != version]
    if wanted:
        options = ("--no-deps", "--disable-pip-version-check", "--quiet", "--upgrade", "--target", str(own))
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, *wanted], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise MissingPackageError(
                f"{', '.join(wanted)} cannot be installed",
                expected="a release for this platform and Python",
                found=(done.stderr.strip() or "pip printed nothing").splitlines()[-1],
                next="give a release that pip finds for this platform and Python",
            )
    return executable
