"""Link, hash and replace files."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def link(source: Path, destination: Path) -> None:
    """Hard-link `destination` to `source`, or copy it where the file system has no hard links."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_blob(path: Path) -> str:
    """Return git's blob id of a file, in hex, as the hub reports it for files outside LFS."""
    content = path.read_bytes()  # files outside LFS are small
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield `path`.part to create; rename it to `path` at the end, or remove it on an error.

    A hard link to the old file elsewhere keeps the old content.
    """
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)  # a symbolic link placed there would redirect the bytes to another folder
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Replace `path` atomically with `text`, in UTF-8."""
    with atomic_write(path) as part, part.open("x", encoding="utf-8", newline="\n") as file:
        file.write(text)
