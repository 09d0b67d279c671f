"""In: the folder of a bundle. Out: what lies in it, file by file, as its manifest says: a `Content`.

Guaranteed: every file of the manifest is there, a plain file of its size; every other file is evidence, the signature,
or what the hub lays beside a download; nothing in the folder is a link, a pipe or a device. No file is read but JSON
and graphs (see `builder.bundle.layout`): `builder.bundle.check` compares the bytes.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.bundle.layout import EVIDENCE, MANIFEST, OTHERWISE, check_bundle
from builder.util.errors import BundleError, UnsafeError
from builder.util.json_files import read_json

SIGNATURE = "model.sig"
# What the hub adds to every repository, and its client to every folder that it downloads into.
OF_THE_HUB = (".gitattributes", ".cache/huggingface")
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """What a manifest says of a file: bytes, and SHA-256 in hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Content:
    """A bundle's files, relative to `folder`, with `/`.

    Args:
        manifest: what manifest.json says.
        target: the runtime that it is for.
        files: those of the manifest; the manifest itself is not among them.
        evidence: the files below evidence/, sorted.
        signed: whether there is a signature; whose it is, `builder.bundle.sign` tells.
    """

    folder: Path
    manifest: Mapping[str, Any]
    target: str
    files: Mapping[str, Entry]
    evidence: tuple[str, ...]
    signed: bool

    @property
    def shipped(self) -> tuple[str, ...]:
        """All but the evidence, sorted: what runs, what says so, and who signed it."""
        return tuple(sorted((*self.files, MANIFEST, *((SIGNATURE,) if self.signed else ()))))

    @property
    def name(self) -> str:
        """`<checkpoint>-<recipe>-<target>`: the same wherever the folder lies."""
        parts = [_part(self.manifest, "checkpoint"), _part(self.manifest, "recipe"), self.target]
        return "-".join(re.sub(r"[^\w.-]+", "_", part) for part in parts if part).strip(".") or "bundle"


def open_content(folder: Path) -> Content:
    """What is in the bundle in `folder`.

    Raises:
        BundleError: no bundle; a file missing, of another size, or that the manifest does not list.
        UnsafeError: a link, something that is no file, or a name that leaves the folder.
    """
    target = check_bundle(folder)
    manifest = read_json(folder / MANIFEST)
    files = _entries(folder, manifest.get("files"))
    there = set(_walk(folder))
    if missing := sorted({*files} - there):
        raise BundleError(
            f"{missing[0]} is missing from {folder}",
            expected="every file that manifest.json lists",
            found=", ".join(missing[:8]),
            next=OTHERWISE,
        )
    evidence = {name for name in there if name.startswith(f"{EVIDENCE}/")}
    if beside := sorted(there - {*files} - evidence - {MANIFEST, SIGNATURE}):
        raise BundleError(
            f"{beside[0]} lies in {folder}, and its manifest does not list it",
            expected=f"the files of {MANIFEST}, and {EVIDENCE}/",
            found=", ".join(beside[:8]),
            next="remove what you laid there yourself; else " + OTHERWISE,
        )
    return Content(folder, manifest, target, files, tuple(sorted(evidence)), SIGNATURE in there)


def _entries(folder: Path, files: Any) -> dict[str, Entry]:
    """`check_bundle` has seen that each is a file of that size."""
    found = {}
    for name, facts in files.items() if isinstance(files, Mapping) else ():
        digest = facts.get("sha256")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise BundleError(
                f"{folder / MANIFEST} does not say which bytes {name} has",
                expected="sha256: 64 hex digits",
                found=digest,
                next=OTHERWISE,
            )
        if name in (MANIFEST, SIGNATURE) or name.startswith(f"{EVIDENCE}/") or name != os.path.normpath(name):
            raise BundleError(f"{folder / MANIFEST} lists {name}", expected="the bundle's own files", next=OTHERWISE)
        found[name] = Entry(int(facts["size"]), digest)
    if not found:
        raise BundleError(f"{folder / MANIFEST} lists no files", expected="names, each with size and sha256")
    return dict(sorted(found.items()))


def _walk(folder: Path) -> Iterator[str]:
    """Every file below `folder` but the hub's own, relative, as plain files are."""
    waiting = [folder]
    while waiting:
        for entry in sorted(os.scandir(waiting.pop()), key=lambda one: one.name):
            path = Path(entry.path)
            name = path.relative_to(folder).as_posix()
            kind = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(kind):
                waiting += [path] if name not in OF_THE_HUB else []
            elif not stat.S_ISREG(kind):
                raise UnsafeError(
                    f"{name} in {folder} is no plain file",
                    expected="files and folders, no links",
                    found="a link" if stat.S_ISLNK(kind) else "a pipe, a socket or a device",
                    next="from the hub: `hf download REPO --local-dir FOLDER` leaves files; else " + OTHERWISE,
                )
            elif name not in OF_THE_HUB:
                yield name


def _part(manifest: Mapping[str, Any], key: str) -> str:
    found = manifest.get(key)
    return str(found.get("name", ""))[:80] if isinstance(found, Mapping) else ""
