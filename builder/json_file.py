"""In: a JSON file of a checkpoint. Out: its top-level object.

Guaranteed: no more than `MAX_BYTES` are read, and whatever is wrong with the file is a `CheckpointError`
that names it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from builder.errors import CheckpointError

# The largest JSON file of a real checkpoint is its tokenizer.json, 11 MB.
MAX_BYTES = 64 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`.

    Raises:
        CheckpointError: no such file, larger than `MAX_BYTES`, not UTF-8, not JSON, or not an object.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path.name} is missing from {path.parent}",
            expected=f"a file {path.name}",
            next="copy it from the checkpoint that this one was made from",
        )
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read", found=error) from error
    if len(content) > MAX_BYTES:
        raise CheckpointError(f"{path} is too large", expected=f"at most {MAX_BYTES} bytes", found="more")
    return parse_object(content, str(path))


def parse_object(content: bytes, name: str, *, unique: bool = False) -> dict[str, Any]:
    """The JSON object that `content` spells.

    Args:
        content: UTF-8.
        name: what an error calls it.
        unique: refuse a key that is given twice (which makes a large object twice as slow to read).

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object, or a key given twice.
    """
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_object if unique else None)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not JSON", found=error) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is not a JSON object", expected="{…}", found=type(value).__name__)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return found
