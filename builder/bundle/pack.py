"""Pack a bundle into tar archives that are the same bytes wherever they are packed (`qwen3vl-onnx pack`).

`<name>.tar` has the files to run; `<name>-evidence.tar` has the measurements, which differ between verifications.
Entries are sorted, under `<name>/`, without times, owners or permissions, and not compressed: weights do not compress.

Guarantees: every file is compared with the manifest while it is packed; memory does not grow with the bundle; an
archive is complete or absent.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from builder.bundle.check import check_settings, compare_digest
from builder.bundle.inventory import Content, open_content
from builder.bundle.layout import MANIFEST
from builder.util.errors import BundleError, OutputError
from builder.util.files import atomic_write
from builder.util.progress import progress

SUFFIX, EVIDENCE = ".tar", "-evidence"
MEGABYTE = 10**6


@dataclass(frozen=True)
class Packed:
    """An archive: path, size in bytes, SHA-256 in hex."""

    path: Path
    size: int
    sha256: str


def pack(folder: Path, output: Path | None = None) -> tuple[Packed, ...]:
    """Write the bundle's archive, and one of its evidence where there is any.

    Args:
        output: path of the first archive, by default `<name>.tar` here; the evidence goes next to it.

    Raises:
        BundleError, UnsafeError: `builder.bundle.check` refuses the bundle.
        OutputError: an archive cannot be written.
    """
    from builder.bundle.check_graphs import check_graphs

    content = open_content(folder)
    check_settings(content)
    check_graphs(content)
    path = output or Path(content.name + SUFFIX)
    archives = {path: content.shipped, path.with_name(f"{path.stem}{EVIDENCE}{path.suffix}"): content.evidence}
    return tuple(_written(content, names, archive) for archive, names in archives.items() if names)


def _written(content: Content, names: Iterable[str], path: Path) -> Packed:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part, part.open("xb") as file:
            target = _Hashed(file)
            _archive(content, names, target)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written",
            expected="permission and space for a file as large as the bundle",
            found=error.strerror or str(error),
            next="give another --output",
        ) from error
    return Packed(path, path.stat().st_size, target.digest.hexdigest())


def _archive(content: Content, names: Iterable[str], target: _Hashed) -> None:
    names = sorted(names)
    megabytes = sum((content.folder / name).stat().st_size for name in names) // MEGABYTE
    # PAX headers allow files over 8 GB and names over 100 characters.
    with (
        progress("pack, MB", total=megabytes) as advance,
        tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in names:
            with (content.folder / name).open("rb") as file:
                source = _Read(file)
                archive.addfile(_entry(content, name, os.fstat(file.fileno()).st_size), source)
            if name in content.files:
                compare_digest(content, name, source.digest.hexdigest())
            advance(source.size // MEGABYTE)


def _entry(content: Content, name: str, size: int) -> tarfile.TarInfo:
    """Tar header without time, owner or permissions."""
    if name in content.files and size != content.files[name].size:
        raise BundleError(
            f"{name} changed while it was packed", expected=f"the size in {MANIFEST}", found=f"{size} bytes"
        )
    entry = tarfile.TarInfo(f"{content.name}/{name}")
    entry.size, entry.mode, entry.mtime = size, 0o644, 0
    return entry


class _Read:
    """Hash a file while it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        block = self.file.read(size)
        self.digest.update(block)
        self.size += len(block)
        return block


class _Hashed(io.RawIOBase):
    """Hash a file while it is written sequentially."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, block: Any) -> int:
        self.digest.update(block)
        return self.file.write(block)

    def tell(self) -> int:
        return self.file.tell()
