"""Hash what a stage's result depends on, and explain in words why two hashes differ.

The key covers the recipe fields, the inputs' keys, packages, files read, and every module that the stage's module
imports, however deep. Imports are parsed, not run. No path of the machine is part of it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from functools import lru_cache
from pathlib import Path

OWN = frozenset({"builder", "patches"})
UNKNOWN = "?"


@dataclass(frozen=True)
class Components:
    """What a stage's result depends on.

    Args:
        recipe: field → value, as JSON.
        inputs: stage or property of the checkpoint → key or digest; `UNKNOWN` before the checkpoint is fetched.
        code: file (`builder/stages/export.py`) → SHA-256 of its bytes.
        packages: distribution → version, or `MISSING`; runtime of a target → its versions.
    """

    recipe: Mapping[str, object]
    inputs: Mapping[str, str]
    code: Mapping[str, str]
    packages: Mapping[str, str]

    @property
    def key(self) -> str:
        """SHA-256 of the canonical JSON, in hex; `UNKNOWN` if an input is."""
        if UNKNOWN in self.inputs.values():
            return UNKNOWN
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def reasons(old: Components, new: Components) -> list[str]:
    """Describe what differs, the recipe first; empty if nothing does."""
    changes = [
        f"recipe.{name} changed ({_words(before)} → {_words(after)})"
        for name, before, after in _differences(old.recipe, new.recipe)
    ]
    for name, before, after in _differences(old.inputs, new.inputs):
        changes.append(f"{name} not known before fetch" if after == UNKNOWN else _change(name, before, after))
    changes += [f"{name} {before} → {after}" for name, before, after in _differences(old.packages, new.packages)]
    changes += [_change(name, before, after) for name, before, after in _differences(old.code, new.code)]
    return changes


def plain(value: object) -> object:
    """Convert a recipe field's value to JSON types."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: plain(inner) for name, inner in asdict(value).items()}
    if isinstance(value, tuple | list):
        return [plain(inner) for inner in value]
    return value


def code_digests(module: str, files: Iterable[str] = ()) -> dict[str, str]:
    """Hash a module, everything it imports from its own package, `builder` and `patches`, and `files`.

    Args:
        module: dotted name, e.g. `builder.stages.export`.
        files: glob patterns of files that the module reads and does not import, each starting with the name of an
            importable package, e.g. `patches/*.toml`.

    Returns:
        file, relative to its package's parent folder → SHA-256 (hex).

    Raises:
        ModuleNotFoundError: the module does not exist.
        ValueError: a pattern matches no file of an installed package, so that the key would silently miss it.
    """
    top, _, rest = module.partition(".")
    if _module_file(top, rest) is None:
        raise ModuleNotFoundError(f"no module {module!r}", name=module)
    found = _closure(module, OWN | {top})
    for pattern in files:
        found |= _matching(pattern)
    return {name: hashlib.sha256(found[name].read_bytes()).hexdigest() for name in sorted(found)}


def _closure(module: str, packages: frozenset[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        top, _, rest = name.partition(".")
        if name in seen or top not in packages:
            continue
        seen.add(name)
        file = _module_file(top, rest)
        if file is None:
            continue
        found[file.relative_to(_package(top).parent).as_posix()] = file
        # Importing a module runs its parents first.
        waiting.extend(name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1))
        waiting.extend(imports(file.read_text(encoding="utf-8"), name, file.name == "__init__.py"))
    return found


@lru_cache(maxsize=512)
def imports(text: str, module: str, is_package: bool) -> tuple[str, ...]:
    """Return the dotted names that a module may import, at any depth; some may be functions, not modules.

    Imports under `if TYPE_CHECKING:` never run and are left out.
    """
    found: list[str] = []
    for node in _running(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: None if is_package else -1]
                package = package[: len(package) - (node.level - 1)]
                base = ".".join([*package, base] if base else package)
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return tuple(found)


def _running(node: ast.AST) -> Iterator[ast.AST]:
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If):
        name = node.test.attr if isinstance(node.test, ast.Attribute) else getattr(node.test, "id", None)
        children = node.orelse if name == "TYPE_CHECKING" else children
    for child in children:
        yield child
        yield from _running(child)


def _package(top: str) -> Path:
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"no package {top!r}", name=top)
    return Path(next(iter(spec.submodule_search_locations)))


def _module_file(top: str, rest: str) -> Path | None:
    path = _package(top).joinpath(*rest.split(".")) if rest else _package(top)
    candidates = (path / "__init__.py", path.parent / f"{path.name}.py")
    return next((file for file in candidates if file.is_file()), None)


def _matching(pattern: str) -> dict[str, Path]:
    top, _, rest = pattern.partition("/")
    try:
        folder = _package(top)
    except ModuleNotFoundError:
        # A package that is not installed is recorded in `packages`.
        return {}
    found = {file.relative_to(folder.parent).as_posix(): file for file in folder.glob(rest) if file.is_file()}
    if not found:
        raise ValueError(f"a stage key depends on {pattern!r}, which matches no file of the package {top}")
    return found


def _differences(old: Mapping[str, object], new: Mapping[str, object]) -> Iterator[tuple[str, object, object]]:
    for name in [*new, *(name for name in old if name not in new)]:
        if old.get(name) != new.get(name):
            yield name, old.get(name), new.get(name)


def _change(name: str, before: object, after: object) -> str:
    return f"{name} {'added' if before is None else 'removed' if after is None else 'changed'}"


def _words(value: object) -> str:
    if isinstance(value, Mapping):
        return " ".join(map(str, value.values()))
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return "unset" if value is None else str(value)
