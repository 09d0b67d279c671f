"""The spelling that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, among: Iterable[str]) -> str | None:
    """The spelling among `among` that `word` was probably meant to be, or None."""
    return next(iter(difflib.get_close_matches(word, list(among), n=1, cutoff=0.5)), None)
