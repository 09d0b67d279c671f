"""Stage 2: check the patches against the installed transformers, and write their diffs.

Guarantees: a source that a patch was not verified on stops the build; nothing stays patched (`export` applies the
patches); only `record` changes verified.toml, and only after every equivalence check passed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import patches as own
from builder.util.errors import BuildError, PatchError
from patches import source, verified
from patches.registry import Patch, digest, drift, release, require_verified, reverifying, target

if TYPE_CHECKING:
    from builder.stages.engine.build import Build


@dataclass(frozen=True)
class Status:
    """State of a patch on the installed release.

    Args:
        digest: SHA-256 of the installed sources; "" if the target is missing.
        verified: releases that the patch was verified on, oldest first.
        state: "verified", "unknown" (a source that was not verified) or "missing" (no such function).
    """

    name: str
    target: str
    why: str
    remove_when: str
    release: str
    digest: str
    verified: tuple[str, ...]
    state: Literal["verified", "unknown", "missing"]


@dataclass(frozen=True)
class Recorded:
    """A patch whose check passed; `new` if verified.toml did not have the digest."""

    name: str
    release: str
    digest: str
    new: bool


def run(build: Build, out: Path) -> dict[str, Any]:
    """Check every patch that the recipe's targets need, and write `NAME.diff` and `patches.json` into `out`.

    Returns:
        {"patches": {name: {target, why, remove_when, release, digest, verified}}}.

    Raises:
        PatchError: a patch was not verified on the installed source.
    """
    needed = {patch.name: patch for each in build.recipe.targets for patch in own.patches_for(each.attention)}
    require_verified(needed.values())
    facts = {}
    for state in status(needed.values()):
        (out / f"{state.name}.diff").write_text(diff_text(needed[state.name]), encoding="utf-8", newline="\n")
        facts[state.name] = {key: value for key, value in asdict(state).items() if key not in ("name", "state")}
    report = json.dumps({"patches": facts}, indent=2, sort_keys=True)
    (out / "patches.json").write_text(report + "\n", encoding="utf-8", newline="\n")
    return {"patches": facts}


def status(patches: Iterable[Patch] | None = None, file: Path = verified.FILE) -> tuple[Status, ...]:
    """Return the state of patches (default: all) on the installed release; an unverified source is not an error."""
    data = verified.read(file)
    out = []
    for patch in own.all_patches() if patches is None else patches:
        missing = source.locate(patch.target) is None
        found = "" if missing else digest(patch)
        known = found in data.digests.get(patch.name, {}).values()
        out.append(
            Status(
                name=patch.name,
                target=patch.target,
                why=patch.why,
                remove_when=patch.remove_when,
                release=release(patch),
                digest=found,
                verified=data.releases(patch.name),
                state="missing" if missing else "verified" if known else "unknown",
            )
        )
    return tuple(out)


def diff_text(patch: Patch | str, file: Path = verified.FILE) -> str:
    """Return a unified diff from upstream's source to the patched one.

    If the installed source is not verified, its changes since the last verified source come first.

    Raises:
        PatchError: the patch, or its function in the installed release, does not exist.
    """
    found = own.patch(patch) if isinstance(patch, str) else patch
    place = target(found, file)
    lines = [f"{found.name}: {found.why}", f"remove when: {found.remove_when}", ""]
    if digest(found) not in verified.read(file).digests.get(found.name, {}).values():
        lines += ["upstream since it was verified:", drift(found, file), ""]
    lines += difflib.unified_diff(
        source.text(found.target).splitlines(),
        source.function_text(found.make(place.upstream)).splitlines(),
        f"{found.package} {release(found)} {found.target}",
        f"{found.make.__module__.replace('.', '/')}.py",
        lineterm="",
    )
    return "\n".join(lines) + "\n"


def record(patches: Iterable[Patch] | None = None, file: Path = verified.FILE) -> tuple[Recorded, ...]:
    """Run every patch's equivalence check on the installed release and write the digests into verified.toml.

    Verified patches are checked again. Digests of removed patches, or of a different set of functions, are dropped.

    Raises:
        PatchError: a check failed, with its values; nothing is written.
        OutputError: verified.toml cannot be written.
    """
    if not __debug__:
        raise PatchError("the checks are assertions, which are disabled", next="run Python without -O")
    chosen = own.all_patches() if patches is None else tuple(patches)
    failures = {patch.name: failure for patch in chosen if (failure := _failure(patch, file))}
    if failures:
        raise PatchError(
            f"nothing recorded: on {chosen[0].package} {release(chosen[0])}, {', '.join(failures)} failed",
            expected="equal results of upstream and patched code",
            found="\n".join(f"{name}: {failure}" for name, failure in failures.items()),
            next="read `qwen3vl-onnx patches --diff`, fix patches/NAME.py, record again",
        )
    before = verified.read(file)
    after = _with_installed(before, chosen)
    if after != before:
        verified.write(after, file)
    return tuple(
        Recorded(patch.name, release(patch), found, found not in before.digests.get(patch.name, {}).values())
        for patch, found in ((patch, digest(patch)) for patch in chosen)
    )


def _failure(patch: Patch, file: Path) -> str:
    """Return the error of the check, "" if it passed; a new release may raise any exception."""
    try:
        target(patch, file)
        with reverifying():
            patch.check()
    except BuildError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _with_installed(before: verified.Verified, patches: tuple[Patch, ...]) -> verified.Verified:
    digests: dict[str, dict[str, str]] = {}
    lines: dict[str, dict[str, str]] = {}
    for patch in patches:
        digests[patch.name] = {
            each: known
            for each, known in before.digests.get(patch.name, {}).items()
            if set(patch.functions) <= set(before.lines.get(each, {}))
        }
        digests[patch.name][release(patch)] = digest(patch)
        for each in digests[patch.name]:
            fresh = each == release(patch)
            for function in patch.functions:
                text = source.line_digests(source.text(function)) if fresh else before.lines[each][function]
                lines.setdefault(each, {})[function] = text
    return verified.Verified(digests, lines)
