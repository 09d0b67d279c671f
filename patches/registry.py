"""Define patches, and apply them to the installed release of transformers.

Guarantees: a patch is applied only to sources that it was verified on, everything is restored on exit, and a patch that
never ran is an error. Patching changes classes and modules of the entire process: use it from one thread at a time.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.util.errors import MissingPackageError, PatchError
from patches import source, verified

_reverifying: ContextVar[bool] = ContextVar("_reverifying", default=False)


@dataclass(frozen=True)
class Patch:
    """A replacement of an upstream function.

    Args:
        name: the patch's module in `patches/`, and its key in `verified.toml`.
        target: `module:Class.method` (not a classmethod) or `module:function`. The module is the one whose global is
            called, not the one that defines a function imported from elsewhere.
        why: what fails without the patch, in one sentence.
        remove_when: the condition under which the patch can be removed.
        make: takes upstream's function and returns the replacement.
        check: compares upstream with the patch; raises AssertionError with the difference.
        covers: further `module:qualname` whose sources the digest covers, as the target calls and the replacement
            mirrors them. A function that a release does not have counts as the text "absent".
    """

    name: str
    target: str
    why: str
    remove_when: str
    make: Callable[[Callable[..., Any]], Callable[..., Any]]
    check: Callable[[], None]
    covers: tuple[str, ...] = ()

    @property
    def functions(self) -> tuple[str, ...]:
        """The functions that the digest covers, the target first."""
        return (self.target, *self.covers)

    @property
    def package(self) -> str:
        """The top-level upstream package, which is also the name of its distribution."""
        return self.target.partition(":")[0].partition(".")[0]


def release(patch: Patch) -> str:
    """Return the installed release of the patch's upstream package."""
    try:
        return importlib.metadata.version(patch.package)
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingPackageError(
            f"{patch.package} is not installed", next='pip install "qwen3vl-onnx[build]"'
        ) from error


def digest(patch: Patch) -> str:
    """Return 12 hex digits over the installed sources of the patch's target and covers."""
    return source.digest(patch.functions)


def target(patch: Patch, file: Path = verified.FILE) -> source.Place:
    """Return the place of the patch's target.

    Raises:
        PatchError: the installed release has no such function.
    """
    place = source.locate(patch.target)
    if place is not None:
        return place
    known = verified.read(file).releases(patch.name)
    raise PatchError(
        f"patch {patch.name}: {patch.package} {release(patch)} has no {patch.target}",
        expected=f"a function of that name, as in {_listed(known)}",
        found="it was renamed, moved or removed",
        next=f"correct the target in patches/{patch.name}.py"
        + (f', or: pip install "{patch.package}=={known[-1]}"' if known else ""),
    )


def require_verified(patches: Iterable[Patch], file: Path = verified.FILE) -> None:
    """Check that each patch was verified on the installed sources.

    Raises:
        PatchError: a target is missing, or a source is unverified; shows the difference.
    """
    data = verified.read(file)
    unknown = []
    for patch in patches:
        target(patch, file)
        if digest(patch) not in data.digests.get(patch.name, {}).values():
            unknown.append(patch)
    if not unknown:
        return
    installed = f"{unknown[0].package} {release(unknown[0])}"
    raise PatchError(
        f"{', '.join(patch.name for patch in unknown)}: not verified on the source of {installed}",
        expected="; ".join(f"{p.name} on {_listed(data.releases(p.name))}" for p in unknown),
        found="\n".join(f"{p.name}: {p.target}, digest {digest(p)}\n{drift(p, file)}" for p in unknown),
        next="read `qwen3vl-onnx patches --diff`, then re-verify: `qwen3vl-onnx patches --record`",
    )


def drift(patch: Patch, file: Path = verified.FILE) -> str:
    """Return how the installed sources differ from those of the newest verified release, line by line."""
    data = verified.read(file)
    releases = data.releases(patch.name)
    if not releases:
        return "(no release was ever recorded)"
    before, after = f"verified on {releases[-1]}", f"installed {release(patch)}"
    return source.drift(patch.functions, data.lines.get(releases[-1], {}), before, after)


@contextmanager
def applied(patches: Iterable[Patch], file: Path = verified.FILE) -> Iterator[Mapping[str, int]]:
    """Apply the patches inside the `with` block.

    Yields:
        name → number of calls of the replacement so far. `torch.export`, and so `torch.onnx.export`, calls it while
        tracing; Dynamo (`strict=True`) compiles it instead, and its calls are not counted.

    Raises:
        PatchError: an unverified source, a missing target, two patches of one target, or, if the block raises nothing,
            a patch that never ran.

    Example:
        >>> with applied(patches_for("fused")) as calls:
        ...     program = torch.export.export(decoder, inputs)
    """
    chosen = tuple(patches)
    _require_distinct(chosen)
    if not _reverifying.get():
        require_verified(chosen, file)
    calls = {patch.name: 0 for patch in chosen}
    with ExitStack() as restore:
        for patch in chosen:
            _install(patch, target(patch, file), calls, restore)
        yield calls
    if idle := [patch for patch in chosen if not calls[patch.name]]:
        raise PatchError(
            f"installed and never ran: {', '.join(patch.name for patch in idle)}",
            expected="each patch called at least once",
            found=f"no call of {', '.join(patch.target for patch in idle)}",
            next="remove the patch, or set its target to the module where upstream now looks up the function",
        )


@contextmanager
def reverifying() -> Iterator[None]:
    """Let `applied` patch unverified sources inside the `with` block, to check a patch before it is recorded."""
    token = _reverifying.set(True)
    try:
        yield
    finally:
        _reverifying.reset(token)


def _require_distinct(patches: tuple[Patch, ...]) -> None:
    seen: dict[str, str] = {}
    for patch in patches:
        if patch.target in seen:
            raise PatchError(
                f"{seen[patch.target]} and {patch.name} both replace {patch.target}",
                expected="one patch per target",
            )
        seen[patch.target] = patch.name


def _install(patch: Patch, place: source.Place, calls: dict[str, int], restore: ExitStack) -> None:
    upstream, before = place.upstream, place.own
    replacement = patch.make(upstream)

    @functools.wraps(replacement)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[patch.name] += 1
        return replacement(*args, **kwargs)

    setattr(counted, source.UPSTREAM, upstream)
    static = inspect.isclass(place.owner) and isinstance(before, staticmethod)
    setattr(place.owner, place.attribute, staticmethod(counted) if static else counted)
    if before is None:
        restore.callback(delattr, place.owner, place.attribute)
    else:
        restore.callback(setattr, place.owner, place.attribute, before)


def _listed(releases: tuple[str, ...]) -> str:
    return ", ".join(releases) or "no release yet"
