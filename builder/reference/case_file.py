"""Read cases from a TOML file: prompts, images, and what to compare.

An unknown key or tag, a wrong type, an image outside the file's folder, checks that exclude each other, or an unused
synthetic image is a `CasesError` that names the file and the case.

    [[case]]
    name = "a street sign"                 # unique, also among the shipped cases
    prompt = "What does the sign say?"
    images = ["signs/stop.jpg", "small"]   # files below this file's folder, or synthetic images; default none
    checks = ["inputs", "features"]        # default all
    tolerance = "fp32"                     # default; or "tight", a fifth of it
    max_new_tokens = 64                    # default
    limits = "lifted"                      # images may exceed the checkpoint's pixels; with checks = ["features"]
    tags = ["layerwise"]                   # default none; see `Tag`

    [picture.small]
    draw = "noise"
    patches = "least"                      # the least without a resize; or a number of patches; or instead:
    # pixels = [7, 1200]                   # width and height, resized by the checkpoint as needed
    aspect = 2.0                           # width / height, default 1
    seed = 0                               # default
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, ConfigDict, Field, StrictFloat, StrictInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from builder.util.errors import CasesError
from builder.util.spelling import nearest

# In the order of the computation: token ids, pixel values and positions; outputs of the vision encoder; merged
# embeddings; logits of the decoder; greedy tokens; the runtime's own processor, and tokens from its pixels.
Check = Literal["inputs", "features", "embeddings", "decoder", "tokens", "runtime"]
CHECKS: tuple[Check, ...] = get_args(Check)
# The limit for fp32, or the typical error; see builder/verify/tolerances.py.
Tolerance = Literal["fp32", "tight"]
# Select shipped cases where not all of them can run. Tags do not restrict cases that the user adds, and are not part of
# a case's digest in a golden.
#   layerwise: compared layer by layer where the model does not fit in memory, and on the fp32 copy of a quantized
#     bundle: each graph, with no image, one image and several. Cases that differ only in preprocessing are compared on
#     fp32 bundles, whose preprocessing is the same.
#   ranges: run in PyTorch to measure the ranges of activations.
#   self-test: compared on each mutant of `verify --self-test`: one image, and two of different sizes, which is the
#     smallest set that catches all mutants. The first case also measures the thresholds.
Tag = Literal["layerwise", "ranges", "self-test"]
TOKENS = 64  # greedy tokens a case
MOST_BYTES = 2**20  # of one file

_STRICT = ConfigDict(extra="forbid")
_Side = Annotated[StrictInt, Field(ge=1, le=2**16)]


@checked(frozen=True, config=_STRICT)
class SyntheticImage:
    """An image generated for a checkpoint: a number of `patches` that needs no resize, or a size in `pixels`."""

    draw: Literal["noise"]
    patches: Literal["least"] | Annotated[StrictInt, Field(ge=1, le=2**20)] | None = None
    pixels: tuple[_Side, _Side] | None = None
    aspect: Annotated[StrictFloat | StrictInt, Field(ge=1 / 200, le=200)] = 1.0
    seed: Annotated[StrictInt, Field(ge=0)] = 0


@dataclass(frozen=True)
class NamedImage:
    """A synthetic image and its name in the file."""

    name: str
    spec: SyntheticImage


def _in_order(checks: tuple[Check, ...]) -> tuple[Check, ...]:
    return tuple(check for check in CHECKS if check in checks)


@checked(frozen=True, config=_STRICT)
class Entry:
    """A `[[case]]` of a file, with the same keys; `checks` are in the order of `CHECKS`."""

    name: Annotated[str, Field(min_length=1, max_length=80)]
    prompt: str
    images: tuple[str, ...] = ()
    checks: Annotated[tuple[Check, ...], Field(min_length=1), AfterValidator(_in_order)] = CHECKS
    tolerance: Tolerance = "fp32"
    max_new_tokens: Annotated[StrictInt, Field(ge=1, le=4096)] = TOKENS
    limits: Literal["kept", "lifted"] = "kept"
    tags: tuple[Tag, ...] = ()


@dataclass(frozen=True)
class FileCase:
    """A case and its file; `images` are those of `entry`, as existing files or still to be generated."""

    file: Path
    entry: Entry
    images: tuple[Path | NamedImage, ...]

    @property
    def name(self) -> str:
        return self.entry.name


@checked(frozen=True, config=_STRICT)
class _Document:
    case: Annotated[tuple[Entry, ...], Field(min_length=1)]
    picture: dict[str, SyntheticImage] = field(default_factory=dict)


def read_file(path: Path) -> tuple[FileCase, ...]:
    """Read the cases of a file.

    Raises:
        CasesError: see the module.
    """
    try:
        document = TypeAdapter(_Document).validate_python(_parsed(path))
    except ValidationError as error:
        raise _explained(path, error) from None
    for name, image in document.picture.items():
        if (image.patches is None) == (image.pixels is None):
            raise CasesError(
                f"{path}: picture {name!r} needs either `patches` or `pixels`",
                expected="one of them",
                found="neither" if image.pixels is None else "both",
            )
        if image.pixels is not None and image.aspect != 1.0:
            raise CasesError(
                f"{path}: picture {name!r} has `pixels`, which define its aspect",
                expected="no `aspect`",
                found=image.aspect,
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
    return tuple(_resolved(path, case, document.picture) for case in document.case)


def _resolved(path: Path, case: Entry, synthetic: Mapping[str, SyntheticImage]) -> FileCase:
    where = f"{path}: case {case.name!r}"
    if {"tokens", "runtime"} & set(case.checks) and "decoder" not in case.checks:
        raise CasesError(
            f"{where} compares tokens, whose near ties are judged by the error of the logits",
            expected='"decoder" in `checks`',
            found=", ".join(case.checks),
        )
    if case.limits == "lifted" and case.checks != ("features",):
        raise CasesError(
            f"{where} lifts the checkpoint's limits, which runtimes do not",
            expected='checks = ["features"]',
            found=", ".join(case.checks),
        )
    images = tuple(
        NamedImage(image, synthetic[image]) if image in synthetic else _inside(path, where, image)
        for image in case.images
    )
    return FileCase(path, case, images)


def _inside(path: Path, where: str, image: str) -> Path:
    """Resolve the path of an image; it must be below the folder of `path`, after following links."""
    folder = path.parent.resolve()
    file = (folder / image).resolve() if "\0" not in image else folder
    if Path(image).is_absolute() or not file.is_relative_to(folder):
        raise CasesError(
            f"{where}: {image!r} is outside the folder of the cases file",
            expected=f"a file below {path.parent}",
            found=image,
            next="copy the image there",
        )
    if not file.is_file():
        raise CasesError(
            f"{where}: image {image!r} does not exist", expected=f"a file below {path.parent}", found=image
        )
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
    """Describe the first problem in terms of the file; unknown keys come first."""
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != _UNKNOWN)
    problem = problems[0]
    place = [str(part) for part in problem["loc"]]
    key = ".".join(place)
    if problem["type"] == _UNKNOWN:
        kind: Any = {"case": Entry, "picture": SyntheticImage}[place[0]] if len(place) > 1 else _Document
        known = [key.name for key in fields(kind)]
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
    return CasesError(f"{path}: `{key}` is not valid", expected=problem["msg"], found=repr(problem["input"])[:200])
