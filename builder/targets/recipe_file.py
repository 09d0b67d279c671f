"""Read and write recipes as TOML files.

Nothing in a recipe is ignored: an unknown key, a wrong type or a combination that no target can run is a `RecipeError`
that names the file and the key.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from builder.quantization.rules import Rule
from builder.targets.graphs import GRAPHS
from builder.targets.providers import Name, Precision, check_provider
from builder.targets.recipe import Attention, Limits, Recipe, Target
from builder.targets.registry import PACKAGING
from builder.util.errors import RecipeError
from builder.util.spelling import nearest

SHIPPED = Path(__file__).parents[1] / "recipes"
DEFAULT = "fp32"
# onnxruntime-genai allocates a key-value buffer of this length; the checkpoint's own context has 262,144 tokens.
MAX_LENGTH = 4096


def _known(runtime: str) -> str:
    if runtime not in GRAPHS:
        raise ValueError(f"Input should be one of: {', '.join(GRAPHS)}")
    return runtime


@checked(frozen=True, config=ConfigDict(extra="forbid", defer_build=True))
class _Document:
    precision: Precision
    targets: Annotated[tuple[Annotated[str, AfterValidator(_known)], ...], Field(min_length=1)]
    attention: dict[str, Attention] = field(default_factory=dict)
    max_length: Annotated[int, Field(strict=True, ge=1)] = MAX_LENGTH
    provider: Name = "cpu"
    rules: tuple[Rule, ...] = ()
    limits: Limits | None = None


_SECTIONS: Mapping[str, type] = {"": _Document, "rules": Rule, "limits": Limits}
_UNKNOWN = "unexpected_keyword_argument"
_A_TABLE = 'one of "eager", "fused" for every target, or a table such as { genai = "eager" }'


def shipped() -> list[str]:
    """Return the names of the recipes in the package, sorted."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def load_recipe(name_or_path: str | Path = DEFAULT) -> Recipe:
    """Read a shipped recipe by name, or any `.toml` file by path.

    Raises:
        RecipeError: there is no such recipe, the file is not valid TOML, a key is unknown (the error suggests the
            nearest spelling), a value is invalid, or the values cannot be combined.

    Example:
        >>> load_recipe("int4").provider
        'cpu'
    """
    path = _locate(str(name_or_path))
    document = _inherit(path, _parse(path))
    attention = document.get("attention")
    if isinstance(attention, str):
        document = {**document, "attention": dict.fromkeys(GRAPHS, attention)}
    elif isinstance(attention, dict):
        _check_runtimes(path, attention)
    try:
        read = TypeAdapter(_Document).validate_python(document)
    except ValidationError as error:
        raise _explain(path, error) from None
    targets = _targets(path, read, one_for_all=isinstance(attention, str))
    recipe = Recipe(path.stem, read.precision, targets, read.max_length, read.provider, read.rules, read.limits)
    _check_runnable(path, recipe)
    return recipe


def _locate(name: str) -> Path:
    if name.endswith(".toml"):
        return Path(name)
    if name in shipped():
        return SHIPPED / f"{name}.toml"
    near = nearest(name, shipped())
    raise RecipeError(
        f"there is no recipe {name!r}",
        expected=f"one of: {', '.join(shipped())}; or the path of a .toml file",
        found=name,
        next=f"--recipe {near or DEFAULT}",
    )


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason, expected = error.strerror or str(error), "a readable TOML file"
    except (ValueError, RecursionError) as error:
        reason, expected = str(error), "TOML 1.0 in UTF-8"
    raise RecipeError(f"recipe {path} cannot be read", expected=expected, found=reason)


def _inherit(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """Add the keys that `document` does not set from the shipped recipe that it is `like`."""
    if "like" not in document:
        return document
    base = document.pop("like")
    if base not in shipped() or base == path.stem:
        raise RecipeError(
            f"recipe {path}: `like` does not name another shipped recipe",
            expected=f"one of: {', '.join(name for name in shipped() if name != path.stem)}",
            found=repr(base),
        )
    return {**_inherit(SHIPPED / f"{base}.toml", _parse(SHIPPED / f"{base}.toml")), **document}


def _explain(path: Path, error: ValidationError) -> RecipeError:
    """Describe the first problem, by the recipe's key; unknown keys come before all others."""
    problem = min(error.errors(include_url=False), key=lambda entry: entry["type"] != _UNKNOWN)
    place = [str(part) for part in problem["loc"]]
    key = ".".join(place)
    if problem["type"] == _UNKNOWN:
        section = ".".join(part for part in place[:-1] if not part.isdigit())
        return _unknown(path, key, [entry.name for entry in fields(_SECTIONS[section])])
    if problem["type"] == "missing":
        return RecipeError(f"recipe {path}: the key `{key}` is missing", next=f"add `{key} = …`")
    expected = _A_TABLE if problem["type"] == "dataclass_type" else problem["msg"]
    return RecipeError(f"recipe {path}: `{key}` is invalid", expected=expected, found=repr(problem["input"]))


def _unknown(path: Path, key: str, known: Iterable[str]) -> RecipeError:
    word = key.rpartition(".")[2]
    near = nearest(word, known)
    return RecipeError(
        f"recipe {path}: unknown key `{key}`",
        expected=f"one of: {', '.join(sorted(known))}",
        found=word,
        next=f"did you mean `{near}`?" if near else f"remove `{key}`",
    )


def _check_runtimes(path: Path, attention: Mapping[str, Any]) -> None:
    for runtime in attention:
        if runtime not in GRAPHS:
            raise _unknown(path, f"attention.{runtime}", GRAPHS)


def _targets(path: Path, document: _Document, *, one_for_all: bool) -> tuple[Target, ...]:
    runtimes = document.targets
    if len(set(runtimes)) != len(runtimes):
        raise RecipeError(f"recipe {path}: `targets` names a runtime twice", found=", ".join(runtimes))
    attention = document.attention
    unused = [runtime for runtime in attention if runtime not in runtimes]
    if unused and not one_for_all:
        raise RecipeError(
            f"recipe {path}: `attention.{unused[0]}` is for a runtime that is not in `targets`",
            expected=f"only: {', '.join(runtimes)}",
            found=unused[0],
            next=f'add "{unused[0]}" to `targets`, or remove `attention.{unused[0]}`',
        )
    for runtime in runtimes:
        supported = GRAPHS[runtime].attentions
        if attention.get(runtime, supported[0]) not in supported:
            raise RecipeError(
                f"recipe {path}: the target `{runtime}` does not support {attention[runtime]} attention",
                expected=" or ".join(supported) + ": fused attention is not a standard ONNX operator",
                found=attention[runtime],
                next='write a table instead: attention = { genai = "fused" }',
            )
    return tuple(Target(runtime, attention.get(runtime, GRAPHS[runtime].attentions[0])) for runtime in runtimes)


def as_toml(recipe: Recipe, remark: str) -> str:
    """Format a recipe as a file for `load_recipe`, with `remark` as the leading comment."""
    targets = [target.runtime for target in recipe.targets]
    lines = [f"# {line}" for line in remark.splitlines()]
    lines += [f"{key} = {json.dumps(getattr(recipe, key))}" for key in ("precision", "provider", "max_length")]
    lines.append(f"targets = {json.dumps(targets)}")
    defaults = {entry.name: entry.default for entry in fields(Rule)}
    for rule in recipe.rules:
        set_here = {key: value for key, value in asdict(rule).items() if value != defaults[key]}
        lines += ["", "[[rules]]", *(f"{key} = {json.dumps(value)}" for key, value in set_here.items())]
    if recipe.limits is not None:
        lines += ["", "[limits]", *(f"{key} = {json.dumps(value)}" for key, value in asdict(recipe.limits).items())]
    return "\n".join(lines) + "\n"


def _check_runnable(path: Path, recipe: Recipe) -> None:
    """Reject missing or superfluous limits, and a precision, rules or a provider that a target does not support."""
    check_provider(recipe.provider, recipe.precision, recipe.rules, path)
    for rule in recipe.rules:
        if rule.activations == "int8" and (rule.store != "int8" or rule.zero_points or rule.search == "gptq"):
            raise RecipeError(
                f"recipe {path}: 8-bit activations require 8-bit weights with one scale per row",
                expected='store = "int8", no zero points, search = "none" or "mse"',
                found=f"store = {rule.store!r}, zero_points = {rule.zero_points}, search = {rule.search!r}",
                next="remove `activations`, or change the other keys",
            )
    if recipe.exact != (recipe.limits is None):
        raise RecipeError(
            f"recipe {path}: " + ("an exact recipe has no `limits`" if recipe.exact else "`limits` is missing"),
            expected="no `limits`: fp32 equals the model"
            if recipe.exact
            else "a table of the accuracy that this build may lose",
            found="limits" if recipe.exact else "none",
            next="remove `limits`"
            if recipe.exact
            else "copy the limits of a shipped recipe, or measure and set your own",
        )
    names = [target.runtime for target in recipe.targets]
    exact = [name for name in names if not GRAPHS[name].quantized]
    if recipe.rules and exact:
        raise RecipeError(
            f"recipe {path}: the target `{exact[0]}` does not support `rules`",
            expected=f"{_targets_line(lambda name: GRAPHS[name].quantized)}: "
            "the operators for quantized blocks are not in standard ONNX",
            found=", ".join(names),
            next=f'remove "{exact[0]}" from `targets`, or `rules`',
        )
    for name in names:
        precisions, chooses = GRAPHS[name].precisions, PACKAGING[name].provider
        if recipe.precision not in precisions or (recipe.provider != "cpu" and not chooses):
            provider = "" if chooses else ", and its runtime chooses the execution provider"
            raise RecipeError(
                f"recipe {path}: the target `{name}` is built in {' or '.join(precisions)}{provider}",
                expected=f'provider = "cpu", precision = "{precisions[0]}"',
                found=f"{recipe.provider}, {recipe.precision}",
                next=_targets_line(
                    lambda name: recipe.precision in GRAPHS[name].precisions and PACKAGING[name].provider
                ),
            )
    either = [target for target in recipe.targets if len(GRAPHS[target.runtime].attentions) > 1]
    if not recipe.exact and any(target.attention == "eager" for target in either):
        raise RecipeError(
            f"recipe {path}: eager attention is built in fp32 only",
            expected="fused",
            found="eager",
            next="remove `attention`",
        )


def _targets_line(suitable: Callable[[str], bool]) -> str:
    """Return a recipe's line with all suitable targets."""
    names = ", ".join(f'"{name}"' for name in GRAPHS if suitable(name))
    return f"targets = [{names}]"
