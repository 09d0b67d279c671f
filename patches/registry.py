"""A patch as a value, and the one way to apply it.

In: patches, and the upstream release that is installed. Out: a context in which upstream's functions are
replaced. Guaranteed: nothing is installed over a source that the patch was not verified on, everything is
restored on every exit, and a patch that was installed and never ran is an error. Classes and modules change
for the whole process: one thread at a time.
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
    """One upstream function, replaced.

    Args:
        name: the patch's module in `patches/`, and its key in `verified.toml`.
        target: `module:Class.method` (not a classmethod) or `module:function`, the module being the one where
            the name is looked up: a function that another module imported by name is not reached through the
            module that defines it.
        why: one sentence: what fails without it.
        remove_when: what retires it.
        make: from upstream's function to the replacement.
        check: the equivalence check: upstream against patched; raises AssertionError with figures.
        covers: further `module:qualname` whose sources the digest covers: what the target calls and the
            replacement mirrors. One that a release does not have counts as the text "absent".
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
        """Everything that the digest covers, the target first."""
        return (self.target, *self.covers)

    @property
    def package(self) -> str:
        """The upstream distribution, named as its top-level package."""
        return self.target.partition(":")[0].partition(".")[0]


def release(patch: Patch) -> str:
    """The installed release of the patch's upstream package."""
    try:
        return importlib.metadata.version(patch.package)
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingPackageError(
            f"{patch.package} is not installed", next='pip install "qwen3vl-onnx[build]"'
        ) from error


def digest(patch: Patch) -> str:
    """12 hex digits over the installed sources of the patch's target and covers."""
    return source.digest(patch.functions)


def target(patch: Patch, file: Path = verified.FILE) -> source.Place:
    """Where the patch's target is looked up.

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
    """Compare each installed source with the verified ones.

    Raises:
        PatchError: a target is missing, or a source that the patch was not verified on, with what differs.
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
    """How the installed sources differ from those of the newest verified release, line by line."""
    data = verified.read(file)
    releases = data.releases(patch.name)
    if not releases:
        return "(no release was ever recorded)"
    before, after = f"verified on {releases[-1]}", f"installed {release(patch)}"
    return source.drift(patch.functions, data.lines.get(releases[-1], {}), before, after)


@contextmanager
def applied(patches: Iterable[Patch], file: Path = verified.FILE) -> Iterator[Mapping[str, int]]:
    """Install the patches for the length of the `with` block.

    Yields:
        name → how often the replacement was called so far. Tracing calls it (`torch.export`, and so
        `torch.onnx.export`); Dynamo (`strict=True`) compiles it instead, and it counts as never run.

    Raises:
        PatchError: an unverified source, a missing target, two patches of one target, or, when the block
            itself ends well, a patch that never ran.
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
            next="remove the patch, or name the module where upstream now looks the function up",
        )


@contextmanager
def reverifying() -> Iterator[None]:
    """Let `applied` install over unverified sources: only for a patch's own check, before it is recorded."""
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
                expected="one patch a target",
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
