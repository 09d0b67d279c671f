"""What a stage's result depends on, as a hash and in words.

In: the recipe fields that a stage reads, its inputs' keys, its module's name, the files and packages it
uses. Out: `Components`, their hash, and the sentences that tell two of them apart. Guaranteed: nothing of
the stage is imported to find out, no path of the machine enters, and a change in any file that the module
imports, however far down, changes the key.
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
    """Everything that a stage's result depends on.

    Args:
        recipe: field name → value, as JSON has it.
        inputs: stage, or fact of the checkpoint → key or digest; `UNKNOWN` before the checkpoint is fetched.
        code: file (`builder/stages/export.py`) → SHA-256 of its bytes.
        packages: distribution → version, or `MISSING`; runtime of a target → versions of what plays it.
    """

    recipe: Mapping[str, object]
    inputs: Mapping[str, str]
    code: Mapping[str, str]
    packages: Mapping[str, str]

    @property
    def key(self) -> str:
        """SHA-256 of the canonical JSON; `UNKNOWN` where an input is."""
        if UNKNOWN in self.inputs.values():
            return UNKNOWN
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def reasons(old: Components, new: Components) -> list[str]:
    """What differs, in words, what the user changed first; empty when nothing does."""
    said = [
        f"recipe.{name} changed ({_words(before)} → {_words(after)})"
        for name, before, after in _differences(old.recipe, new.recipe)
    ]
    for name, before, after in _differences(old.inputs, new.inputs):
        said.append(f"{name} not known before fetch" if after == UNKNOWN else _fate(name, before, after))
    said += [f"{name} {before} → {after}" for name, before, after in _differences(old.packages, new.packages)]
    said += [_fate(name, before, after) for name, before, after in _differences(old.code, new.code)]
    return said


def plain(value: object) -> object:
    """A recipe field's value as JSON has it."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: plain(one) for name, one in asdict(value).items()}
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    return value


def code_digests(module: str, files: Iterable[str] = ()) -> dict[str, str]:
    """Digests of a module, of all that it imports from its own and our packages, and of `files`.

    Args:
        module: dotted name, e.g. `builder.stages.export`.
        files: glob patterns of what the module reads rather than imports, each starting with the name of an
            importable package, e.g. `patches/*.toml`.

    Returns:
        file, relative to the folder that holds its package → SHA-256 (hex).

    Raises:
        ModuleNotFoundError: there is no such module.
        ValueError: a pattern that matches no file of an installed package: it would leave the key without a word.
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
    """Dotted names that a module's text may import, wherever in it; some may be no module but a function.

    What stands under `if TYPE_CHECKING:` never runs and is left out.
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
    return next((one for one in candidates if one.is_file()), None)


def _matching(pattern: str) -> dict[str, Path]:
    top, _, rest = pattern.partition("/")
    try:
        folder = _package(top)
    except ModuleNotFoundError:
        # Nothing is lost: a package that is not installed shows up among `packages`.
        return {}
    found = {one.relative_to(folder.parent).as_posix(): one for one in folder.glob(rest) if one.is_file()}
    if not found:
        raise ValueError(f"no file of the package {top} matches {pattern!r}, on which a stage key depends")
    return found


def _differences(old: Mapping[str, object], new: Mapping[str, object]) -> Iterator[tuple[str, object, object]]:
    for name in [*new, *(name for name in old if name not in new)]:
        if old.get(name) != new.get(name):
            yield name, old.get(name), new.get(name)


def _fate(name: str, before: object, after: object) -> str:
    return f"{name} {'added' if before is None else 'is gone' if after is None else 'changed'}"


def _words(value: object) -> str:
    if isinstance(value, Mapping):
        return " ".join(str(one) for one in value.values())
    if isinstance(value, list):
        return ", ".join(_words(one) for one in value)
    return "unset" if value is None else str(value)
