"""Read the JSON and text files of a checkpoint or a bundle, which may be hostile.

Guarantees: at most `MAX_BYTES`, `MAX_VALUES` and `MAX_DEPTH` are read; the result can be written as JSON in UTF-8 again
(no NaN, no lone surrogate); any fault of the file is a `CheckpointError` that names it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from builder.util.errors import CheckpointError

# The largest JSON file of a real checkpoint is its tokenizer.json, 11 MB.
MAX_BYTES = 32 * 2**20
MAX_TEXT = 2**20  # a chat template's source; the longest known are 30,000 characters
# A value takes about 100 bytes of memory, however short its text. That tokenizer.json has 0.8 million.
MAX_VALUES = 2_000_000
# Deeper nesting would exceed the recursion limit of code that reads the value next. A tokenizer.json has 8 levels.
MAX_DEPTH = 64
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in `path`.

    Raises:
        CheckpointError: no such file, larger than `MAX_BYTES`, not UTF-8, not JSON, not an object, or over a limit.
    """
    return parse_object(_content(path, MAX_BYTES), str(path))


def read_text(path: Path) -> str:
    """Return the text in `path`.

    Raises:
        CheckpointError: no such file, larger than `MAX_TEXT`, or not UTF-8.
    """
    try:
        return _content(path, MAX_TEXT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text", found=error) from error


def _content(path: Path, most: int) -> bytes:
    if not path.is_file():
        raise CheckpointError(
            f"{path.name} is missing from {path.parent}",
            expected=f"a file {path.name}",
            next="copy it from the checkpoint that this one was made from",
        )
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read", found=error) from error
    if len(content) > most:
        raise CheckpointError(f"{path} is too large", expected=f"at most {most} bytes", found="more")
    return content


def parse_object(content: bytes, name: str, *, unique: bool = False) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        content: UTF-8.
        name: of the content, for error messages.
        unique: refuse duplicate keys (parsing a large object then takes twice as long).

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object, too many values, too deep, or a key given twice.
    """
    most = sum(content.count(mark) for mark in (b",", b"[", b"{")) + 1
    if most > MAX_VALUES:
        raise CheckpointError(f"{name} holds too much", expected=f"at most {MAX_VALUES} values", found=f"up to {most}")
    try:
        value = json.loads(
            content.decode("utf-8"), object_pairs_hook=_object if unique else None, parse_constant=_no_number
        )
        if _SURROGATE.search(content):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not JSON", found=error) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is not a JSON object", expected="{…}", found=type(value).__name__)
    _check_depth(value, name)
    return value


def _check_depth(value: dict[str, Any], name: str) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) in (dict, list)
        ]
    if level:
        raise CheckpointError(f"{name} is nested too deeply", expected=f"at most {MAX_DEPTH} levels", found="more")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"the key {name!r} is given twice")
        content[name] = value
    return content


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
