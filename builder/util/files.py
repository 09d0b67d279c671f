"""Files that are the same bytes in two places."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path


def link(source: Path, destination: Path) -> None:
    """`destination` becomes the same file as `source`; a copy where the file system has no hard links."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replaces `path` as a whole: a hard link to the old file elsewhere keeps the old text."""
    part = path.with_name(path.name + ".part")
    # Made anew: a link that someone laid there would lead the text to another folder.
    part.unlink(missing_ok=True)
    with part.open("x", encoding="utf-8", newline="\n") as file:
        file.write(text)
    os.replace(part, path)
