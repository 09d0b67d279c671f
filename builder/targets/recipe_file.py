"""Read a recipe, which alone says what to build, from a TOML file.

An unknown key, a wrong type, or a combination that no target can run is a `RecipeError` that names the file and the
key; nothing in a recipe is ignored.
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
# At the checkpoint's own context (262,144) onnxruntime-genai would allocate a key-value buffer of that size.
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
    """Names of the recipes that come with the package, sorted."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def load_recipe(name_or_path: str | Path = DEFAULT) -> Recipe:
    """Read a shipped recipe by name, or any `.toml` file by path.

    Raises:
        RecipeError: no such recipe, no TOML, an unknown key (with the nearest spelling), a wrong type or
            value, or a target and attention that do not go together.
    """
    path = _located(str(name_or_path))
    document = _completed(path, _parsed(path))
    attention = document.get("attention")
    if isinstance(attention, str):
        document = {**document, "attention": dict.fromkeys(GRAPHS, attention)}
    elif isinstance(attention, dict):
        _check_runtimes(path, attention)
    try:
        read = TypeAdapter(_Document).validate_python(document)
    except ValidationError as error:
        raise _explained(path, error) from None
    targets = _targets(path, read, one_for_all=isinstance(attention, str))
    recipe = Recipe(path.stem, read.precision, targets, read.max_length, read.provider, read.rules, read.limits)
    _check_runnable(path, recipe)
    return recipe


def _located(name: str) -> Path:
    if name.endswith(".toml"):
        return Path(name)
    if name in shipped():
        return SHIPPED / f"{name}.toml"
    near = nearest(name, shipped())
    raise RecipeError(
        f"no recipe is called {name!r}",
        expected=f"one of: {', '.join(shipped())}; or the path of a .toml file",
        found=name,
        next=f"--recipe {near or DEFAULT}",
    )


def _parsed(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason, expected = error.strerror or str(error), "a readable TOML file"
    except (ValueError, RecursionError) as error:
        reason, expected = str(error), "TOML 1.0 in UTF-8"
    raise RecipeError(f"recipe {path} cannot be read", expected=expected, found=reason)


def _completed(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """With the keys that it does not set from the shipped recipe that it is `like`."""
    if "like" not in document:
        return document
    model = document.pop("like")
    if model not in shipped() or model == path.stem:
        raise RecipeError(
            f"recipe {path}: `like` names no other shipped recipe",
            expected=f"one of: {', '.join(name for name in shipped() if name != path.stem)}",
            found=repr(model),
        )
    return {**_completed(SHIPPED / f"{model}.toml", _parsed(SHIPPED / f"{model}.toml")), **document}


def _explained(path: Path, error: ValidationError) -> RecipeError:
    """The first problem in the recipe's own words; an unknown key goes before everything else."""
    problems = sorted(error.errors(include_url=False), key=lambda one: one["type"] != _UNKNOWN)
    problem = problems[0]
    place = [str(part) for part in problem["loc"]]
    key = ".".join(place)
    if problem["type"] == _UNKNOWN:
        section = ".".join(part for part in place[:-1] if not part.isdigit())
        return _unknown(path, key, [one.name for one in fields(_SECTIONS[section])])
    if problem["type"] == "missing":
        return RecipeError(f"recipe {path}: the key `{key}` is missing", next=f"add `{key} = …`")
    expected = _A_TABLE if problem["type"] == "dataclass_type" else problem["msg"]
    return RecipeError(f"recipe {path}: `{key}` is not right", expected=expected, found=repr(problem["input"]))


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
    asked = document.attention
    unused = [runtime for runtime in asked if runtime not in runtimes]
    if unused and not one_for_all:
        raise RecipeError(
            f"recipe {path}: `attention.{unused[0]}` is for a runtime that `targets` does not name",
            expected=f"only: {', '.join(runtimes)}",
            found=unused[0],
            next=f'add "{unused[0]}" to `targets`, or remove `attention.{unused[0]}`',
        )
    for runtime in runtimes:
        able = GRAPHS[runtime].attentions
        if asked.get(runtime, able[0]) not in able:
            raise RecipeError(
                f"recipe {path}: {asked[runtime]} attention is no choice for the target `{runtime}`",
                expected=" or ".join(able) + ": fused attention is no standard ONNX operator",
                found=asked[runtime],
                next='write a table instead: attention = { genai = "fused" }',
            )
    return tuple(Target(runtime, asked.get(runtime, GRAPHS[runtime].attentions[0])) for runtime in runtimes)


def as_toml(recipe: Recipe, remark: str) -> str:
    """The recipe as a file that `load_recipe` reads; `remark` is its first comment."""
    targets = [target.runtime for target in recipe.targets]
    lines = [f"# {line}" for line in remark.splitlines()]
    lines += [f"{key} = {json.dumps(getattr(recipe, key))}" for key in ("precision", "provider", "max_length")]
    lines.append(f"targets = {json.dumps(targets)}")
    defaults = {one.name: one.default for one in fields(Rule)}
    for rule in recipe.rules:
        set_here = {key: value for key, value in asdict(rule).items() if value != defaults[key]}
        lines += ["", "[[rules]]", *(f"{key} = {json.dumps(value)}" for key, value in set_here.items())]
    if recipe.limits is not None:
        lines += ["", "[limits]", *(f"{key} = {json.dumps(value)}" for key, value in asdict(recipe.limits).items())]
    return "\n".join(lines) + "\n"


def _check_runnable(path: Path, recipe: Recipe) -> None:
    """Refuse limits that are missing or superfluous, and a precision, rules or a provider that a target cannot have."""
    check_provider(recipe.provider, recipe.precision, recipe.rules, path)
    for rule in recipe.rules:
        if rule.activations == "int8" and (rule.store != "int8" or rule.zero_points or rule.search == "gptq"):
            raise RecipeError(
                f"recipe {path}: 8-bit activations are multiplied with 8-bit weights of one scale a row",
                expected='store = "int8", no zero points, search = "none" or "mse"',
                found=f"store = {rule.store!r}, zero_points = {rule.zero_points}, search = {rule.search!r}",
                next="remove `activations`, or change the others",
            )
    if recipe.exact != (recipe.limits is None):
        raise RecipeError(
            f"recipe {path}: " + ("`limits` is for what may lose" if recipe.exact else "`limits` is missing"),
            expected="no `limits`: fp32 equals the model" if recipe.exact else "what this build may lose, as a table",
            found="limits" if recipe.exact else "none",
            next="remove `limits`" if recipe.exact else "take those of a shipped recipe, or measure and set your own",
        )
    names = [target.runtime for target in recipe.targets]
    exact = [name for name in names if not GRAPHS[name].quantized]
    if recipe.rules and exact:
        raise RecipeError(
            f"recipe {path}: `rules` cannot be carried out for the target `{exact[0]}`",
            expected=f"{_able(lambda name: GRAPHS[name].quantized)}: "
            "the operators for quantized blocks are not standard ones",
            found=", ".join(names),
            next=f'remove "{exact[0]}" from `targets`, or `rules`',
        )
    for name in names:
        precisions, chooses = GRAPHS[name].precisions, PACKAGING[name].provider
        if recipe.precision not in precisions or (recipe.provider != "cpu" and not chooses):
            provider = "" if chooses else ", and its runtime chooses the provider"
            raise RecipeError(
                f"recipe {path}: the target `{name}` is built in {' or '.join(precisions)}{provider}",
                expected=f'provider = "cpu", precision = "{precisions[0]}"',
                found=f"{recipe.provider}, {recipe.precision}",
                next=_able(lambda name: recipe.precision in GRAPHS[name].precisions and PACKAGING[name].provider),
            )
    either = [target for target in recipe.targets if len(GRAPHS[target.runtime].attentions) > 1]
    if not recipe.exact and any(target.attention == "eager" for target in either):
        raise RecipeError(
            f"recipe {path}: eager attention is built in fp32 only",
            expected="fused",
            found="eager",
            next="remove `attention`",
        )


def _able(may: Callable[[str], bool]) -> str:
    """The line of a recipe with every target that may."""
    names = ", ".join(f'"{name}"' for name in GRAPHS if may(name))
    return f"targets = [{names}]"
