"""Installed versions of distributions."""

from __future__ import annotations

from importlib import metadata

MISSING = "not installed"


def version(distribution: str) -> str:
    """Return the installed version, or `MISSING`, without importing the package."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return MISSING
