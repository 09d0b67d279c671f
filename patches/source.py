"""Locate, digest and compare the sources of upstream functions, named `module:Class.method` or `module:function`.

Only digests of texts and of single lines are kept, so that a later release can be compared line by line with the
verified release without a copy of either in this repository.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from types import ModuleType
from typing import Any

from builder.util.errors import MissingPackageError, PatchError

ABSENT = "absent"
UPSTREAM = "__upstream__"  # attribute of an installed replacement: the function that it replaces
DIGITS = 12
LINE_DIGITS = 6


@dataclass(frozen=True)
class Place:
    """The place of a function: `getattr(owner, attribute)`."""

    owner: Any
    attribute: str

    @property
    def upstream(self) -> Callable[..., Any]:
        """Upstream's function, also while a patch replaces it."""
        value = getattr(self.owner, self.attribute)
        while hasattr(value, UPSTREAM):
            value = getattr(value, UPSTREAM)
        return value  # type: ignore[no-any-return]

    @property
    def own(self) -> Any:
        """The attribute in the owner's `__dict__` (e.g. a staticmethod), or None if it is inherited."""
        return vars(self.owner).get(self.attribute)


def locate(name: str) -> Place | None:
    """Return the place of `module:qualname`, or None if this release has no such module, class or function.

    Raises:
        MissingPackageError: the top-level package is not installed.
    """
    module_name, _, qualname = name.partition(":")
    module = _module(module_name)
    *outer, attribute = qualname.split(".")
    try:
        owner = reduce(getattr, outer, module)
        getattr(owner, attribute)
    except AttributeError:
        return None
    return Place(owner, attribute)


def text(name: str) -> str:
    """Return the source of `module:qualname` (see `function_text`), or "absent" if there is no such function.

    Raises:
        PatchError: the function has no readable source.
    """
    place = locate(name)
    if place is None:
        return ABSENT
    try:
        return function_text(place.upstream)
    except (OSError, TypeError) as error:
        raise PatchError(
            f"the source of {name} cannot be read, so its patch cannot be verified",
            expected="a package installed with its .py files",
            found=str(error),
        ) from error


def function_text(function: Callable[..., Any]) -> str:
    """Return the source of a function with its decorators, dedented, with "\\n" line endings."""
    return "\n".join(textwrap.dedent(inspect.getsource(function)).splitlines()) + "\n"


def digest(names: Iterable[str]) -> str:
    """Return 12 hex digits of the SHA-256 over each name and its source text, in order."""
    total = hashlib.sha256()
    for name in names:
        total.update(f"{name}\0{text(name)}\0".encode())
    return total.hexdigest()[:DIGITS]


def line_digests(source: str) -> str:
    """Return 6 hex digits of each line's SHA-256, without separators."""
    return "".join(hashlib.sha256(line.encode()).hexdigest()[:LINE_DIGITS] for line in source.splitlines())


def drift(names: Iterable[str], verified: Mapping[str, str], before: str, after: str) -> str:
    """Compare the installed sources with the line digests of the verified sources.

    Args:
        names: the functions to compare.
        verified: function → line digests of the verified release, for functions that the digest covered then.
        before, after: labels of the two sides in the diff's header.

    Returns:
        a unified diff per function that differs; new and unchanged lines in full, removed lines as digests.
    """
    parts = []
    for name in names:
        old, new = verified.get(name, line_digests(ABSENT)), text(name)
        if old != line_digests(new):
            parts.append("\n".join([f"--- {name} ({before})", f"+++ {name} ({after})", *_hunks(old, new)]))
    return "\n".join(parts) or "(no line differs: the set of functions that the digest covers has changed since)"


def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name.partition(".")[0]:
            raise MissingPackageError(
                f"{error.name} is not installed", next='pip install "qwen3vl-onnx[build]"'
            ) from error
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return None
        raise


def _hunks(old: str, new: str) -> list[str]:
    removed = [old[i : i + LINE_DIGITS] for i in range(0, len(old), LINE_DIGITS)]
    lines = new.splitlines()
    known = line_digests(new)
    kept = [known[i : i + LINE_DIGITS] for i in range(0, len(known), LINE_DIGITS)]
    out = []
    for group in difflib.SequenceMatcher(None, removed, kept, autojunk=False).get_grouped_opcodes():
        (_, i1, _, j1, _), (_, _, i2, _, j2) = group[0], group[-1]
        out.append(f"@@ -{i1 + 1},{i2 - i1} +{j1 + 1},{j2 - j1} @@")
        for kind, i1, i2, j1, j2 in group:
            if kind == "equal":
                out += [f" {line}" for line in lines[j1:j2]]
                continue
            out += [f"-«line {i + 1} removed ({removed[i]})»" for i in range(i1, i2)]
            out += [f"+{line}" for line in lines[j1:j2]]
    return out
