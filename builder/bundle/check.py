"""`qwen3vl-onnx check`: whether a bundle is what it says, for whoever got it from somewhere.

In: a bundle's folder, perhaps a public key. Out: `Checked`, every check with what it looked at. Guaranteed: nothing
that the bundle says is believed, and nothing of it is run: every file of the manifest is read to its end, and what the
manifest says of graphs is compared with the graphs. What no check can tell without a key is who wrote the manifest.
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
    """One check that holds: what it is, and what it looked at."""

    check: str
    found: str


@dataclass(frozen=True)
class Checked:
    """A bundle that passed.

    Args:
        manifest: SHA-256 of manifest.json, which names every other file's: one number to compare with the builder's.
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
        """A row a check, then the number to compare."""
        rows = ((row.check, row.found, "" if row.found.startswith("not ") else "pass") for row in self.rows)
        yield console_table(f"{self.folder}: {self.target}", ("check", "found", ""), rows)
        yield f"{MANIFEST}: sha256 {self.manifest}"


def check(folder: Path, key: Path | None = None) -> Checked:
    """Every check of the bundle in `folder`.

    Args:
        key: a PEM file; the bundle must then be signed by the private key that belongs to it.

    Raises:
        BundleError: files, contract or settings that are not as declared; SignatureError: not signed by that key.
        UnsafeError: a name, a link or an operator that leads out of the folder; code that a runtime would load.
    """
    content = open_content(folder)
    files = f"{len(content.files)} of the manifest, {len(content.evidence)} of evidence, no other, no links"
    rows = [CheckRow("files", files)]
    check_settings(content)
    rows.append(CheckRow("settings", "JSON of moderate size; names no file outside, no library, no remote code"))
    rows += _graph_rows(content)
    check_bytes(content)
    rows += _code_rows(content)
    rows.append(CheckRow("bytes", f"SHA-256 of {size(sum(one.size for one in content.files.values()))}"))
    signature = _check_signature(content, key)
    told = {"holds": f"{SIGNATURE}, by the key {key}", "none": "not signed", "not checked": "not checked: no --key"}
    rows.append(CheckRow("signature", told[signature]))
    digest = sha256(folder / MANIFEST)
    return Checked(folder, content.target, digest, signature, tuple(rows))


def check_bytes(content: Content) -> None:
    """Reads every file of the manifest.

    Raises:
        BundleError: other bytes than the manifest names.
    """
    megabytes = sum(one.size for one in content.files.values()) // 10**6
    with progress("sha256, MB", total=megabytes) as advance:
        for name in content.files:
            digest, seen = hashlib.sha256(), 0
            for block in _blocks(content.folder / name):
                digest.update(block)
                before, seen = seen, seen + len(block)
                advance(seen // 10**6 - before // 10**6)
            compare_digest(content, name, digest.hexdigest())


def compare_digest(content: Content, name: str, digest: str) -> None:
    """Raises:
    BundleError: `digest` is not what the manifest says of the file `name`.
    """
    if digest != content.files[name].sha256:
        raise BundleError(
            f"{name} is not the file that {content.folder / MANIFEST} names",
            expected=f"sha256 {content.files[name].sha256}",
            found=f"sha256 {digest}",
            next=OTHERWISE,
        )


def check_settings(content: Content) -> None:
    """That every JSON file can be read, and that nothing asks a runtime to load code.

    Raises:
        BundleError: a JSON file that no reader should be given.
        UnsafeError: pickles, libraries, custom operators, remote code.
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
        if name == GENAI and (asked := [key for key in _keys(settings) if "custom_op" in key or "library" in key]):
            raise UnsafeError(
                f"{name} has the runtime load a library", expected="no custom operators", found=asked[0], next=OTHERWISE
            )


def _json(content: Content, name: str) -> Mapping[str, Any]:
    try:
        return read_json(content.folder / name)
    except CheckpointError as error:
        raise BundleError(
            f"the bundle's {name} cannot be read", expected=error.expected or "JSON", found=error.what, next=OTHERWISE
        ) from error


def _keys(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield from one
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def _graph_rows(content: Content) -> list[CheckRow]:
    from builder.bundle.check_graphs import check_graphs

    found = check_graphs(content)
    return [
        CheckRow("contract", f"{found['ports']} ports of {found['graphs']} graphs, as declared"),
        CheckRow("operators", f"{found['operators']} kinds, all of the target's domains, as declared"),
        CheckRow("external data", f"{found['external tensors']} tensors, all inside the bundle's files"),
    ]


def _code_rows(content: Content) -> list[CheckRow]:
    """Programs that lie in the bundle, which only a person can judge."""
    written = [program for runtime in PACKAGING.values() for program in runtime.programs().items()]
    own = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in written}
    programs = [name for name in content.files if name.endswith(PROGRAMS)]
    known = {name: content.files[name].sha256 == own.get(name) for name in programs}
    told = [name if same else f"{name} (not this release's: read it before you run it)" for name, same in known.items()]
    return [CheckRow("code", ("" if all(known.values()) else "not judged: ") + ", ".join(told))] if told else []


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
