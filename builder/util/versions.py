"""Installed versions of distributions."""

from __future__ import annotations

from importlib import metadata

MISSING = "not installed"


def version(distribution: str) -> str:
    """The installed version, or `MISSING`; imports nothing of it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return MISSING
