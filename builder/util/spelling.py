"""Suggest the intended spelling of a misspelled name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, among: Iterable[str]) -> str | None:
    """Return the closest match for `word`, or None if nothing is close."""
    return next(iter(difflib.get_close_matches(word, list(among), n=1, cutoff=0.5)), None)
