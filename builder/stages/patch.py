"""Stage 2: hold the patches of upstream against the installed transformers, and leave readable evidence.

In: the recipe's targets, whose `attention` says which patches are needed, and the installed transformers.
Out: `NAME.diff` (upstream to patched) a patch and `patches.json`; besides, what `qwen3vl-onnx patches`
shows and records. Guaranteed: a source that a patch was not verified on stops the build here; nothing stays
patched (it is `export` that applies them); verified.toml changes only in `record`, and only after every
equivalence check passed.
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
    """A patch against the installed release.

    Args:
        digest: of the installed sources; "" where the target is missing.
        verified: the releases that the patch was verified on, oldest first.
        state: "verified", "unknown" (a source that was never verified) or "missing" (no such function).
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
    """A patch whose check passed; `new` where verified.toml did not say so before."""

    name: str
    release: str
    digest: str
    new: bool


def run(build: Build, out: Path) -> dict[str, Any]:
    """Check every patch that the recipe's targets need, and write the evidence into `out`.

    Returns:
        {"patches": {name: {target, why, remove_when, release, digest, verified}}}.

    Raises:
        PatchError: a source that a patch was not verified on.
    """
    needed = {one.name: one for each in build.recipe.targets for one in own.patches_for(each.attention)}
    require_verified(needed.values())
    facts = {}
    for one in status(needed.values()):
        (out / f"{one.name}.diff").write_text(diff_text(needed[one.name]), encoding="utf-8", newline="\n")
        facts[one.name] = {key: value for key, value in asdict(one).items() if key not in ("name", "state")}
    report = json.dumps({"patches": facts}, indent=2, sort_keys=True)
    (out / "patches.json").write_text(report + "\n", encoding="utf-8", newline="\n")
    return {"patches": facts}


def status(patches: Iterable[Patch] | None = None, file: Path = verified.FILE) -> tuple[Status, ...]:
    """Each patch (all by default) against what is installed; an unverified source is a state, no error."""
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
    """What the patch changes: a unified diff from upstream's source to the replacement's.

    Where the installed source is not a verified one, the difference between the two stands before it.

    Raises:
        PatchError: no such patch, or no such function in the installed release.
    """
    one = own.patch(patch) if isinstance(patch, str) else patch
    place = target(one, file)
    lines = [f"{one.name}: {one.why}", f"remove when: {one.remove_when}", ""]
    if digest(one) not in verified.read(file).digests.get(one.name, {}).values():
        lines += ["upstream since it was verified:", drift(one, file), ""]
    lines += difflib.unified_diff(
        source.text(one.target).splitlines(),
        source.function_text(one.make(place.upstream)).splitlines(),
        f"{one.package} {release(one)} {one.target}",
        f"{one.make.__module__.replace('.', '/')}.py",
        lineterm="",
    )
    return "\n".join(lines) + "\n"


def record(patches: Iterable[Patch] | None = None, file: Path = verified.FILE) -> tuple[Recorded, ...]:
    """Run every patch's equivalence check on the installed release and write the digests into verified.toml.

    Patches that are already verified are checked again. Digests that can never match again (of a patch that
    is gone, or taken when it covered other functions) are dropped.

    Raises:
        PatchError: a check failed, naming it and its figures; nothing is written then.
        OutputError: verified.toml cannot be written.
    """
    if not __debug__:
        raise PatchError("checks are assertions, and this Python runs without them", next="run without -O")
    chosen = own.all_patches() if patches is None else tuple(patches)
    failures = {patch.name: said for patch in chosen if (said := _failure(patch, file))}
    if failures:
        raise PatchError(
            f"nothing recorded: on {chosen[0].package} {release(chosen[0])}, {', '.join(failures)} failed",
            expected="upstream and patched give the same numbers",
            found="\n".join(f"{name}: {said}" for name, said in failures.items()),
            next="read `qwen3vl-onnx patches --diff`, correct patches/NAME.py, record again",
        )
    before = verified.read(file)
    after = _with_installed(before, chosen)
    if after != before:
        verified.write(after, file)
    return tuple(
        Recorded(one.name, release(one), found, found not in before.digests.get(one.name, {}).values())
        for one, found in ((one, digest(one)) for one in chosen)
    )


def _failure(patch: Patch, file: Path) -> str:
    """What the check said; "" where it passed. Any exception is a verdict: a release may raise anything."""
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
