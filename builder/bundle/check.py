"""Check a bundle of unknown origin (`qwen3vl-onnx check`).

Nothing in the bundle is trusted or run: every file of the manifest is read completely, and the graphs are compared with
the manifest. Without a key, no check can tell who wrote the manifest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from builder.bundle.inventory import SIGNATURE, Content, open_content
from builder.bundle.layout import GENAI, MANIFEST, OTHERWISE
from builder.checkpoint.files import MAY_NAME_CODE, PICKLES, refuse_remote_code
from builder.targets.registry import PACKAGING
from builder.util.console_table import console_table
from builder.util.errors import BundleError, CheckpointError, UnsafeError
from builder.util.files import sha256
from builder.util.json_files import read_json
from builder.util.progress import progress
from builder.util.units import size

BLOCK = 8 * 2**20
PROGRAMS = (".py", ".js", ".mjs", ".html")
LIBRARIES = (".so", ".dll", ".dylib", ".pyd", ".exe")


@dataclass(frozen=True)
class CheckRow:
    """A check that passed, and what it covered."""

    check: str
    found: str


@dataclass(frozen=True)
class Checked:
    """Result for a bundle that passed all checks.

    Args:
        manifest: SHA-256 of manifest.json, which has the digests of all other files: compare it with the builder's.
        signature: `none`, `not checked` (no key was given), or `holds`.
    """

    folder: Path
    target: str
    manifest: str
    signature: str
    rows: tuple[CheckRow, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "bundle": str(self.folder),
            "target": self.target,
            "manifest sha256": self.manifest,
            "signature": self.signature,
            "checks": [{"check": row.check, "found": row.found} for row in self.rows],
        }

    def renderables(self) -> Iterator[RenderableType]:
        """Yield a table of the checks, then the digest to compare."""
        rows = ((row.check, row.found, "" if row.found.startswith("not ") else "pass") for row in self.rows)
        yield console_table(f"{self.folder}: {self.target}", ("check", "found", ""), rows)
        yield f"{MANIFEST}: sha256 {self.manifest}"


def check(folder: Path, key: Path | None = None) -> Checked:
    """Run every check on the bundle in `folder`.

    Args:
        key: public key in PEM; the bundle must then be signed with the matching private key.

    Raises:
        BundleError: files, ports or settings differ from the manifest.
        SignatureError: the bundle is not signed with that key.
        UnsafeError: a name, link or operator leads out of the folder, or a runtime would load code.
    """
    content = open_content(folder)
    files = f"{len(content.files)} in the manifest, {len(content.evidence)} in evidence/, no other files, no links"
    rows = [CheckRow("files", files)]
    check_settings(content)
    rows.append(CheckRow("settings", "JSON of moderate size; no outside files, libraries or remote code"))
    rows += _graph_rows(content)
    check_bytes(content)
    rows += _code_rows(content)
    rows.append(CheckRow("bytes", f"SHA-256 of {size(sum(entry.size for entry in content.files.values()))}"))
    signature = _check_signature(content, key)
    found = {"holds": f"{SIGNATURE}, verified with {key}", "none": "not signed", "not checked": "not checked: no --key"}
    rows.append(CheckRow("signature", found[signature]))
    digest = sha256(folder / MANIFEST)
    return Checked(folder, content.target, digest, signature, tuple(rows))


def check_bytes(content: Content) -> None:
    """Hash every file of the manifest.

    Raises:
        BundleError: a digest differs from the manifest.
    """
    megabytes = sum(entry.size for entry in content.files.values()) // 10**6
    with progress("sha256, MB", total=megabytes) as advance:
        for name in content.files:
            digest, seen = hashlib.sha256(), 0
            for block in _blocks(content.folder / name):
                digest.update(block)
                before, seen = seen, seen + len(block)
                advance(seen // 10**6 - before // 10**6)
            compare_digest(content, name, digest.hexdigest())


def compare_digest(content: Content, name: str, digest: str) -> None:
    """Compare `digest`, SHA-256 in hex, with the manifest's entry for the file `name`.

    Raises:
        BundleError: they differ.
    """
    if digest != content.files[name].sha256:
        raise BundleError(
            f"{name} does not match {content.folder / MANIFEST}",
            expected=f"sha256 {content.files[name].sha256}",
            found=f"sha256 {digest}",
            next=OTHERWISE,
        )


def check_settings(content: Content) -> None:
    """Check that every JSON file can be parsed and that no file makes a runtime load code.

    Raises:
        BundleError: a JSON file is malformed, too large or too deep.
        UnsafeError: there are pickles, libraries, custom operators or remote code.
    """
    for name in content.files:
        if name.endswith((*PICKLES, *LIBRARIES)):
            raise UnsafeError(
                f"{name} can run code when it is loaded",
                expected="graphs, weights, settings",
                found=name,
                next=OTHERWISE,
            )
        if not name.endswith(".json"):
            continue
        settings = _json(content, name)
        if name in MAY_NAME_CODE:
            refuse_remote_code(settings, name)
        if name == GENAI and (unsafe := [key for key in _keys(settings) if "custom_op" in key or "library" in key]):
            raise UnsafeError(
                f"{name} makes the runtime load a library",
                expected="no custom operators",
                found=unsafe[0],
                next=OTHERWISE,
            )


def _json(content: Content, name: str) -> Mapping[str, Any]:
    try:
        return read_json(content.folder / name)
    except CheckpointError as error:
        raise BundleError(
            f"the bundle's {name} cannot be read", expected=error.expected or "JSON", found=error.what, next=OTHERWISE
        ) from error


def _keys(document: Any) -> Iterator[str]:
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _graph_rows(content: Content) -> list[CheckRow]:
    from builder.bundle.check_graphs import check_graphs

    counts = check_graphs(content)
    return [
        CheckRow("contract", f"{counts['ports']} ports of {counts['graphs']} graphs, as declared"),
        CheckRow("operators", f"{counts['operators']} kinds, all in the target's domains, as declared"),
        CheckRow("external data", f"{counts['external tensors']} tensors, all inside the bundle's files"),
    ]


def _code_rows(content: Content) -> list[CheckRow]:
    """List the programs in the bundle; a program that differs from this release's needs a person to read it."""
    written = [program for runtime in PACKAGING.values() for program in runtime.programs().items()]
    own = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in written}
    programs = [name for name in content.files if name.endswith(PROGRAMS)]
    known = {name: content.files[name].sha256 == own.get(name) for name in programs}
    listed = [
        name if same else f"{name} (differs from this release's: read before running)" for name, same in known.items()
    ]
    return [CheckRow("code", ("" if all(known.values()) else "not checked: ") + ", ".join(listed))] if listed else []


def _check_signature(content: Content, key: Path | None) -> str:
    if key is None:
        return "not checked" if content.signed else "none"
    from builder.bundle.sign import check_signature

    check_signature(content, key)
    return "holds"


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            yield block
