"""Read and write `verified.toml`, the upstream sources that each patch was verified on.

Guarantees: equal data gives equal bytes, and the file is replaced atomically.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

from packaging.version import Version
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from builder.util.errors import OutputError, PatchError

FILE = Path(__file__).with_name("verified.toml")
HEADER = """\
# The upstream releases that each patch was verified on.
# Written by `qwen3vl-onnx patches --record`, never by hand.
# [digests.PATCH]    release = 12 hex digits of the SHA-256 over the sources of the patch's target and covers.
# [lines."RELEASE"]  function = 6 hex digits of the SHA-256 of each of its lines: no upstream text is kept
#                    here, and a release that differs can still be compared line by line with this one.
"""


def _version(text: str) -> str:
    Version(text)
    return text


Release = Annotated[str, AfterValidator(_version)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{12}$")]
LineDigests = Annotated[str, Field(pattern="^([0-9a-f]{6})+$")]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Verified:
    """Verified sources.

    Args:
        digests: patch → release → digest.
        lines: release → function → line digests (see patches/source.py).
    """

    digests: Mapping[str, Mapping[Release, Digest]] = Field(default_factory=dict)
    lines: Mapping[Release, Mapping[str, LineDigests]] = Field(default_factory=dict)

    def releases(self, patch: str) -> tuple[str, ...]:
        """Return the releases that the patch was verified on, oldest first."""
        return tuple(in_order(self.digests.get(patch, {})))


def in_order(releases: Iterable[str]) -> list[str]:
    """Sort releases, oldest first."""
    return sorted(releases, key=Version)


def read(file: Path = FILE) -> Verified:
    """Read the file; without a file, nothing is verified.

    Raises:
        PatchError: the file does not have the form that `write` gives it.
    """
    if not file.is_file():
        return Verified()
    try:
        return TypeAdapter(Verified).validate_python(tomllib.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:  # TOML, UTF-8 and pydantic errors are all ValueErrors
        raise PatchError(
            f"{file.name} is damaged",
            expected="the file as it was recorded",
            found=error,
            next=f"git checkout patches/{file.name}",
        ) from error


def write(verified: Verified, file: Path = FILE) -> None:
    """Replace the file.

    Raises:
        OutputError: the file cannot be written, e.g. in a read-only installation.
    """
    parts = [HEADER]
    for patch in sorted(verified.digests):
        parts.append(_table(f"digests.{_key(patch)}", verified.digests[patch], verified.releases(patch)))
    for release in in_order(verified.lines):
        rows = verified.lines[release]
        parts.append(_table(f"lines.{_key(release)}", rows, sorted(rows)))
    part = file.with_name(f"{file.name}.part")
    try:
        part.write_text("\n".join(parts), encoding="utf-8", newline="\n")
        os.replace(part, file)
    except OSError as error:
        raise OutputError(
            f"{file} cannot be written: {error.strerror}",
            next="record in a checkout of the repository, where the file can be reviewed and committed",
        ) from error


def _table(name: str, rows: Mapping[str, str], order: Iterable[str]) -> str:
    return "\n".join([f"[{name}]", *(f'{_key(key)} = "{rows[key]}"' for key in order)]) + "\n"


def _key(text: str) -> str:
    return text if re.fullmatch("[A-Za-z0-9_-]+", text) else json.dumps(text)
