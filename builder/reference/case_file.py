"""Cases as data: a TOML file of prompts, pictures, and what is to be compared.

In: a file. Out: `Written` cases, in the file's order. Guaranteed: an unknown key, a wrong type, a picture outside the
file's folder, or checks that do not go together is a `CasesError` that names the file and the case; nothing in a file
is ignored, a drawn picture that no case uses included.

    [[case]]
    name = "a street sign"                 # its own
    prompt = "What does the sign say?"
    images = ["signs/stop.jpg", "small"]   # files below this file's folder, or pictures that are drawn; default none
    checks = ["inputs", "features"]        # default all
    tolerance = "fp32"                     # default; or "tight", a fifth of it
    max_new_tokens = 64                    # default
    limits = "lifted"                      # pictures may exceed the checkpoint's pixels; with checks = ["features"]

    [picture.small]
    draw = "noise"
    patches = "least"                      # or a number: at least as many, and no resize; or instead:
    # pixels = [7, 1200]                   # width and height, whatever the checkpoint makes of them
    aspect = 2.0                           # width / height, default 1
    seed = 0                               # default
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, StrictFloat, StrictInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from builder.util.errors import CasesError
from builder.util.spelling import nearest

FP32 = 1e-4  # of the output's standard deviation; 2e-5 is what is seen

# What a case can have compared, in the order in which the model computes: token ids, pixel values and positions;
# what the vision encoder makes; the merged embeddings; the decoder's logits; greedy tokens; the runtime's own
# processor, and tokens from its pixels.
Check = Literal["inputs", "features", "embeddings", "decoder", "tokens", "runtime"]
CHECKS: tuple[Check, ...] = get_args(Check)
# Largest differences, over the standard deviation of PyTorch's values: what fp32 allows, and what is usually seen.
Tolerance = Literal["fp32", "tight"]
TOLERANCES: Mapping[Tolerance, float] = {"fp32": FP32, "tight": FP32 / 5}
TOKENS = 64  # greedy tokens a case
MOST_BYTES = 2**20  # of one file

_STRICT = ConfigDict(extra="forbid")
_Side = Annotated[StrictInt, Field(ge=1, le=2**16)]


@checked(frozen=True, config=_STRICT)
class Picture:
    """A picture that is drawn for a checkpoint: `patches` of it that need no resize, or a size in `pixels`."""

    draw: Literal["noise"]
    patches: Literal["least"] | Annotated[StrictInt, Field(ge=1, le=2**20)] | None = None
    pixels: tuple[_Side, _Side] | None = None
    aspect: Annotated[StrictFloat | StrictInt, Field(ge=1 / 200, le=200)] = 1.0
    seed: Annotated[StrictInt, Field(ge=0)] = 0


@dataclass(frozen=True)
class Drawn:
    """A picture of this name in its file."""

    name: str
    picture: Picture


@dataclass(frozen=True)
class Written:
    """One case as its file describes it; `images` are files, or are still to be drawn."""

    file: Path
    name: str
    prompt: str
    images: tuple[Path | Drawn, ...]
    checks: tuple[str, ...]
    tolerance: Tolerance
    max_new_tokens: int
    limits: str


@checked(frozen=True, config=_STRICT)
class _Case:
    name: Annotated[str, Field(min_length=1, max_length=80)]
    prompt: str
    images: tuple[str, ...] = ()
    checks: Annotated[tuple[Check, ...], Field(min_length=1)] = CHECKS
    tolerance: Tolerance = "fp32"
    max_new_tokens: Annotated[StrictInt, Field(ge=1, le=4096)] = TOKENS
    limits: Literal["kept", "lifted"] = "kept"


@checked(frozen=True, config=_STRICT)
class _Document:
    case: Annotated[tuple[_Case, ...], Field(min_length=1)]
    picture: dict[str, Picture] = field(default_factory=dict)


def read_file(path: Path) -> tuple[Written, ...]:
    """The cases in one file.

    Raises:
        CasesError: see the module.
    """
    try:
        document = TypeAdapter(_Document).validate_python(_parsed(path))
    except ValidationError as error:
        raise _explained(path, error) from None
    for name, picture in document.picture.items():
        if (picture.patches is None) == (picture.pixels is None):
            raise CasesError(
                f"{path}: picture {name!r} needs either `patches` or `pixels`",
                expected="one of them",
                found="neither" if picture.pixels is None else "both",
            )
        if picture.pixels is not None and picture.aspect != 1.0:
            raise CasesError(
                f"{path}: picture {name!r} has `pixels`, which say its aspect",
                expected="no `aspect`",
                found=picture.aspect,
                next="remove `aspect`",
            )
    used = {image for case in document.case for image in case.images}
    if unused := sorted(document.picture.keys() - used):
        raise CasesError(
            f"{path}: no case uses the picture {unused[0]!r}",
            expected="its name in the `images` of a case",
            found=", ".join(sorted(used)) or "no images",
            next="remove it, or name it in `images`",
        )
    return tuple(_written(path, case, document.picture) for case in document.case)


def _written(path: Path, case: _Case, pictures: Mapping[str, Picture]) -> Written:
    where = f"{path}: case {case.name!r}"
    if {"tokens", "runtime"} & set(case.checks) and "decoder" not in case.checks:
        raise CasesError(
            f"{where} compares tokens, whose near ties are told by the error of the logits",
            expected='"decoder" in `checks`',
            found=", ".join(case.checks),
        )
    if case.limits == "lifted" and case.checks != ("features",):
        raise CasesError(
            f"{where} lifts the checkpoint's limits, which its runtimes keep",
            expected='checks = ["features"]',
            found=", ".join(case.checks),
        )
    images = tuple(
        Drawn(image, pictures[image]) if image in pictures else _inside(path, where, image) for image in case.images
    )
    checks = tuple(check for check in CHECKS if check in case.checks)
    return Written(path, case.name, case.prompt, images, checks, case.tolerance, case.max_new_tokens, case.limits)


def _inside(path: Path, where: str, image: str) -> Path:
    """A picture's file, links followed, which must lie below the folder of `path`."""
    folder = path.parent.resolve()
    file = (folder / image).resolve() if "\0" not in image else folder
    if Path(image).is_absolute() or not file.is_relative_to(folder):
        raise CasesError(
            f"{where}: {image!r} leaves the folder of its file",
            expected=f"a file below {path.parent}",
            found=image,
            next="copy the picture there",
        )
    if not file.is_file():
        raise CasesError(f"{where}: there is no picture {image!r}", expected=f"a file below {path.parent}", found=image)
    return file


def _parsed(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise CasesError(f"{path} is too large", expected=f"at most {MOST_BYTES} bytes", found="more")
        return tomllib.loads(content.decode("utf-8"))
    except OSError as error:
        reason, expected = error.strerror or str(error), "a readable TOML file"
    except (ValueError, RecursionError) as error:
        reason, expected = str(error), "TOML 1.0 in UTF-8"
    raise CasesError(f"{path} cannot be read as cases", expected=expected, found=reason)


_UNKNOWN = "unexpected_keyword_argument"


def _explained(path: Path, error: ValidationError) -> CasesError:
    """The first problem in the file's own words; an unknown key goes before everything else."""
    problems = sorted(error.errors(include_url=False), key=lambda one: one["type"] != _UNKNOWN)
    problem = problems[0]
    place = [str(part) for part in problem["loc"]]
    key = ".".join(place)
    if problem["type"] == _UNKNOWN:
        kind: Any = {"case": _Case, "picture": Picture}[place[0]] if len(place) > 1 else _Document
        known = [one.name for one in fields(kind)]
        near = nearest(place[-1], known)
        return CasesError(
            f"{path}: unknown key `{key}`",
            expected=f"one of: {', '.join(sorted(known))}",
            found=place[-1],
            next=f"did you mean `{near}`?" if near else f"remove `{key}`",
        )
    if problem["type"] == "missing":
        found = ", ".join(problem["input"]) if isinstance(problem["input"], dict) else ""
        return CasesError(
            f"{path}: the key `{key}` is missing",
            expected=f"`{place[-1]}`",
            found=found or "no key",
            next=f"add `{place[-1]} = …`",
        )
    return CasesError(f"{path}: `{key}` is not right", expected=problem["msg"], found=repr(problem["input"])[:200])
