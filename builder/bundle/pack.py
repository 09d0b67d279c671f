"""`qwen3vl-onnx pack`: a bundle as one file, the same bytes wherever and by whomever it is packed.

In: a bundle. Out: `<name>.tar` with what runs, `<name>-evidence.tar` with what was measured, and the SHA-256 of both.
Guaranteed: times, owners and permissions are left out, names are sorted, everything lies below one folder `<name>/`;
every file is compared with the manifest while it is packed; memory does not grow with the bundle; an archive is whole
or absent. Uncompressed: weights do not compress. Two verifications measure different times, so evidence is an archive
of its own.
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
    """An archive: where it is, how large, SHA-256 in hex."""

    path: Path
    size: int
    sha256: str


def pack(folder: Path, output: Path | None = None) -> tuple[Packed, ...]:
    """The bundle's archive, and one of its evidence where there is any.

    Args:
        output: the first archive's path, the evidence's lies beside it; by default `<name>.tar` here.

    Raises:
        BundleError, UnsafeError: what `builder.bundle.check` refuses; OutputError: an archive that cannot be written.
    """
    from builder.bundle.check_graphs import check_graphs

    content = open_content(folder)
    check_settings(content)
    check_graphs(content)
    path = output or Path(content.name + SUFFIX)
    asked = {path: content.shipped, path.with_name(f"{path.stem}{EVIDENCE}{path.suffix}"): content.evidence}
    return tuple(_written(content, names, one) for one, names in asked.items() if names)


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
            expected="room, and permission, for one file as large as the bundle",
            found=error.strerror or str(error),
            next="give another --output",
        ) from error
    return Packed(path, path.stat().st_size, target.digest.hexdigest())


def _archive(content: Content, names: Iterable[str], target: _Hashed) -> None:
    names = sorted(names)
    megabytes = sum((content.folder / name).stat().st_size for name in names) // MEGABYTE
    # PAX: a size of more than 8 GB, and a name of more than 100 characters, need a header of their own.
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
    """Of a file that anybody made at no time."""
    if name in content.files and size != content.files[name].size:
        raise BundleError(f"{name} changed while it was packed", expected=f"as {MANIFEST} says", found=f"{size} bytes")
    entry = tarfile.TarInfo(f"{content.name}/{name}")
    entry.size, entry.mode, entry.mtime = size, 0o644, 0
    return entry


class _Read:
    """A file that is hashed while it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        block = self.file.read(size)
        self.digest.update(block)
        self.size += len(block)
        return block


class _Hashed(io.RawIOBase):
    """A file that is hashed while it is written, from its start to its end."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, block: Any) -> int:
        self.digest.update(block)
        return self.file.write(block)

    def tell(self) -> int:
        return self.file.tell()
