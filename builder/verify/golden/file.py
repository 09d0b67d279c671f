"""A golden's file: what PyTorch made of every case, as data.

In: a path, or a `Golden`. Out: the other. Guaranteed: what is read is of this format, and whole; an unknown key is an
error; one case is one line, so that two files can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from builder.bundle.format1 import upgraded_keys
from builder.util.errors import GoldenError

FORMAT: Literal[2] = 2
MAX_BYTES = 64 * 2**20

_STRICT = ConfigDict(extra="forbid")
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@checked(frozen=True, config=_STRICT)
class Sample:
    """Some values of a tensor: flat indices, values as hex floats with spaces between, the tensor's standard
    deviation as a hex float (0 where it is constant)."""

    shape: tuple[int, ...]
    std: str
    at: tuple[int, ...]
    values: str


@checked(frozen=True, config=_STRICT)
class ImageDigest:
    """SHA-256 of an image's file (None: it was drawn) and of its decoded RGB, with its size, width first."""

    file: Digest | None
    rgb: Digest
    size: tuple[int, int]


@checked(frozen=True, config=_STRICT)
class GoldenCase:
    """What PyTorch makes of one case.

    Args:
        digest: of all that the case says, see `builder.verify.golden.record.case_digest`.
        input_ids: of the whole prompt.
        pixel_values: SHA-256 of each image's rows, float32.
        grids: [images, 3].
        position_ids: SHA-256 of [3, 1, seq] int64.
        vision: behind each block of the vision encoder.
        features: main, then each DeepStack level.
        embeddings: with the features merged, then each DeepStack input.
        decoder: behind each layer.
        logits: of `builder.verify.golden.record.POSITIONS`, one row each: the largest, then some of the rest.
        tokens, margins: greedy, stop tokens barred; PyTorch's lead at each, hex floats.
    """

    name: str
    digest: Digest
    images: tuple[ImageDigest, ...]
    input_ids: tuple[int, ...]
    position_ids: Digest
    pixel_values: tuple[Digest, ...] = ()
    grids: tuple[tuple[int, int, int], ...] = ()
    vision: tuple[Sample, ...] = ()
    features: tuple[Sample, ...] = ()
    embeddings: tuple[Sample, ...] = ()
    decoder: tuple[Sample, ...] = ()
    logits: tuple[Sample, ...] = ()
    tokens: tuple[int, ...] = ()
    margins: str = ""


@checked(frozen=True, config=_STRICT)
class Task:
    """A held-out set: the digest of its questions and images, and PyTorch's answers in its order."""

    digest: Digest
    answers: tuple[str, ...]


@checked(frozen=True, config=_STRICT)
class Made:
    """A checkpoint as a golden (and a bundle's manifest) knows it; `files` are SHA-256 by name."""

    name: str
    revision: str | None
    config_sha256: Digest
    files: dict[str, Digest]


@checked(frozen=True, config=_STRICT)
class Golden:
    """All of a file. `limits` are what images are drawn by (patch, merge, least, most)."""

    format: Literal[1, 2]
    checkpoint: Made
    versions: dict[str, str]
    limits: tuple[int, int, int, int]
    image_token_id: int
    hidden: int
    cases: Annotated[tuple[GoldenCase, ...], Field(min_length=1)]
    task: Task | None


def floats(text: str) -> npt.NDArray[np.float64]:
    """float64 values of hex floats with spaces between."""
    return np.array([float.fromhex(one) for one in text.split()], np.float64)


def read_golden(path: Path) -> Golden:
    """The golden in `path`.

    Raises:
        GoldenError: no golden, of another version of the format, or not whole.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        document = json.loads(content) if len(content) <= MAX_BYTES else None
    except OSError as error:
        raise GoldenError(
            f"the golden {path} cannot be read", expected="a file that can be", found=error.strerror
        ) from None
    except (ValueError, RecursionError) as error:
        raise GoldenError(f"the golden {path} is not whole", expected="JSON", found=error) from None
    found = document.get("format") if isinstance(document, dict) else None
    document = upgraded_keys(document)
    if found not in (1, FORMAT):
        raise GoldenError(f"{path} is no golden of this version", expected=f'"format": {FORMAT}', found=found)
    try:
        return TypeAdapter(Golden).validate_python(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise GoldenError(
            f"the golden {path} is not whole: `{where}`", expected=first["msg"], found=repr(first["input"])[:200]
        ) from None


def text(golden: Golden) -> str:
    """JSON with one case, or one fact, a line."""
    document = asdict(golden)
    cases = document.pop("cases")
    head = [f"{json.dumps(key)}: {_compact(value)}" for key, value in document.items()]
    lines = ",\n".join(_compact(_without_defaults(case)) for case in cases)
    return "{\n" + ",\n".join(head) + ',\n"cases": [\n' + lines + "\n]\n}\n"


def _without_defaults(case: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in case.items() if value or key == "images"}


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
