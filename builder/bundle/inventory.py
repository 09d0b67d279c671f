"""List the files of a bundle as its manifest declares them.

Guarantees: every file of the manifest is a plain file of the declared size; every other file is evidence, the signature
or the hub client's own; there are no links, pipes or devices. Only JSON and graphs are read;
`builder.bundle.check` compares digests.
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
# Written by the hub into every repository, and by its client into every download.
OF_THE_HUB = (".gitattributes", ".cache/huggingface")
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """A file in the manifest: size in bytes, and SHA-256 in hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Content:
    """A bundle's files, as paths relative to `folder`, with `/`.

    Args:
        manifest: content of manifest.json.
        target: the runtime that the bundle is for.
        files: the files that the manifest lists, which excludes the manifest itself.
        evidence: the files in evidence/, sorted.
        signed: whether there is a signature, which `builder.bundle.sign` checks.
    """

    folder: Path
    manifest: Mapping[str, Any]
    target: str
    files: Mapping[str, Entry]
    evidence: tuple[str, ...]
    signed: bool

    @property
    def shipped(self) -> tuple[str, ...]:
        """All files but the evidence, sorted, with the manifest and the signature."""
        return tuple(sorted((*self.files, MANIFEST, *((SIGNATURE,) if self.signed else ()))))

    @property
    def name(self) -> str:
        """`<checkpoint>-<recipe>-<target>`, whatever the folder is called."""
        parts = [_part(self.manifest, "checkpoint"), _part(self.manifest, "recipe"), self.target]
        return "-".join(re.sub(r"[^\w.-]+", "_", part) for part in parts if part).strip(".") or "bundle"


def open_content(folder: Path) -> Content:
    """Read the manifest of the bundle in `folder`, and compare it with the files there.

    Raises:
        BundleError: `folder` is not a bundle, or a file is missing, has a different size, or is not in the manifest.
        UnsafeError: there is a link or a special file, or a name leads out of the folder.
    """
    target = check_bundle(folder)
    manifest = read_json(folder / MANIFEST)
    files = _entries(folder, manifest.get("files"))
    present = set(_walk(folder))
    if missing := sorted({*files} - present):
        raise BundleError(
            f"{missing[0]} is missing from {folder}",
            expected="every file that manifest.json lists",
            found=", ".join(missing[:8]),
            next=OTHERWISE,
        )
    evidence = {name for name in present if name.startswith(f"{EVIDENCE}/")}
    if unlisted := sorted(present - {*files} - evidence - {MANIFEST, SIGNATURE}):
        raise BundleError(
            f"{unlisted[0]} is in {folder} but not in its manifest",
            expected=f"the files of {MANIFEST}, and {EVIDENCE}/",
            found=", ".join(unlisted[:8]),
            next="remove it if you put it there; else " + OTHERWISE,
        )
    return Content(folder, manifest, target, files, tuple(sorted(evidence)), SIGNATURE in present)


def _entries(folder: Path, files: Any) -> dict[str, Entry]:
    """Parse the manifest's files; `check_bundle` has compared their sizes."""
    found = {}
    for name, facts in files.items() if isinstance(files, Mapping) else ():
        digest = facts.get("sha256")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise BundleError(
                f"{folder / MANIFEST} has no valid digest of {name}",
                expected="sha256: 64 hex digits",
                found=digest,
                next=OTHERWISE,
            )
        if name in (MANIFEST, SIGNATURE) or name.startswith(f"{EVIDENCE}/") or name != os.path.normpath(name):
            raise BundleError(
                f"{folder / MANIFEST} lists {name}",
                expected="normalized names, not of the manifest, signature or evidence",
                next=OTHERWISE,
            )
        found[name] = Entry(int(facts["size"]), digest)
    if not found:
        raise BundleError(f"{folder / MANIFEST} lists no files", expected="names, each with size and sha256")
    return dict(sorted(found.items()))


def _walk(folder: Path) -> Iterator[str]:
    """Yield the files of `folder` except the hub's own; refuse anything but plain files and folders."""
    waiting = [folder]
    while waiting:
        for entry in sorted(os.scandir(waiting.pop()), key=lambda entry: entry.name):
            path = Path(entry.path)
            name = path.relative_to(folder).as_posix()
            kind = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(kind):
                waiting += [path] if name not in OF_THE_HUB else []
            elif not stat.S_ISREG(kind):
                raise UnsafeError(
                    f"{name} in {folder} is not a plain file",
                    expected="files and folders, no links",
                    found="a link" if stat.S_ISLNK(kind) else "a pipe, a socket or a device",
                    next="from the hub: `hf download REPO --local-dir FOLDER` writes plain files; else " + OTHERWISE,
                )
            elif name not in OF_THE_HUB:
                yield name


def _part(manifest: Mapping[str, Any], key: str) -> str:
    part = manifest.get(key)
    return str(part.get("name", ""))[:80] if isinstance(part, Mapping) else ""
