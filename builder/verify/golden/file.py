"""The file format of a golden: PyTorch's outputs for every case.

Each case is one line, so that two files can be diffed. Unknown keys are errors.
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
    """Some values of a tensor.

    Args:
        std: standard deviation of the complete tensor as a hex float; 0 if it is constant.
        at: flat indices.
        values: hex floats separated by spaces.
    """

    shape: tuple[int, ...]
    std: str
    at: tuple[int, ...]
    values: str


@checked(frozen=True, config=_STRICT)
class ImageDigest:
    """SHA-256 of an image's file (None if synthetic) and of its decoded RGB, and its (width, height)."""

    file: Digest | None
    rgb: Digest
    size: tuple[int, int]


@checked(frozen=True, config=_STRICT)
class GoldenCase:
    """PyTorch's inputs and outputs for one case.

    Args:
        digest: see `builder.verify.golden.record.case_digest`.
        input_ids: token ids of the prompt.
        position_ids: SHA-256 of [3, 1, seq] int64.
        pixel_values: SHA-256 of each image's rows, float32.
        grids: [images, 3].
        vision: the residual stream after each block of the vision encoder.
        features: main features, then each DeepStack level.
        embeddings: with the features merged, then each DeepStack input.
        decoder: the residual stream after each layer.
        logits: a row for each of `builder.verify.golden.record.POSITIONS`: the largest logits, then some of the rest.
        tokens: greedy, with stop tokens suppressed.
        margins: PyTorch's lead at each token, hex floats separated by spaces.
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
    """A held-out set: the digest of its prompts and images, and PyTorch's answers in order."""

    digest: Digest
    answers: tuple[str, ...]


@checked(frozen=True, config=_STRICT)
class CheckpointIdentity:
    """Identifies a checkpoint in a golden or a bundle's manifest; `files` maps names to SHA-256."""

    name: str
    revision: str | None
    config_sha256: Digest
    files: dict[str, Digest]


@checked(frozen=True, config=_STRICT)
class Golden:
    """The content of a golden file; `limits` are those of synthetic images (patch, merge, least, most)."""

    format: Literal[1, 2]
    checkpoint: CheckpointIdentity
    versions: dict[str, str]
    limits: tuple[int, int, int, int]
    image_token_id: int
    hidden: int
    cases: Annotated[tuple[GoldenCase, ...], Field(min_length=1)]
    task: Task | None


def floats(text: str) -> npt.NDArray[np.float64]:
    """Parse hex floats separated by spaces."""
    return np.array([float.fromhex(value) for value in text.split()], np.float64)


def read_golden(path: Path) -> Golden:
    """Read and validate a golden.

    Raises:
        GoldenError: the file cannot be read, has another format version, or is incomplete or malformed.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        document = json.loads(content) if len(content) <= MAX_BYTES else None
    except OSError as error:
        raise GoldenError(
            f"the golden {path} cannot be read", expected="a readable file", found=error.strerror
        ) from None
    except (ValueError, RecursionError) as error:
        raise GoldenError(f"the golden {path} is incomplete or malformed", expected="JSON", found=error) from None
    version = document.get("format") if isinstance(document, dict) else None
    document = upgraded_keys(document)
    if version not in (1, FORMAT):
        raise GoldenError(f"{path} is not a golden of this version", expected=f'"format": {FORMAT}', found=version)
    try:
        return TypeAdapter(Golden).validate_python(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise GoldenError(
            f"the golden {path} is incomplete or malformed: `{where}`",
            expected=first["msg"],
            found=repr(first["input"])[:200],
        ) from None


def text(golden: Golden) -> str:
    """Serialize as JSON with one line per case and per other key."""
    document = asdict(golden)
    cases = document.pop("cases")
    head = [f"{json.dumps(key)}: {_compact(value)}" for key, value in document.items()]
    lines = ",\n".join(_compact(_without_defaults(case)) for case in cases)
    return "{\n" + ",\n".join(head) + ',\n"cases": [\n' + lines + "\n]\n}\n"


def _without_defaults(case: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in case.items() if value or key == "images"}


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
