"""Write and read parity.json and exhibits.json.

Guarantees: parity.json validates against `schema.json`, which is generated from `ParityFile`; exhibits.json stays below
`MAX_BYTES`; reading accepts images only as inline PNG or JPEG data.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from builder.bundle.format1 import upgraded_keys, upgraded_parity
from builder.util.errors import BundleError, CheckpointError
from builder.util.json_files import read_json
from builder.verify.report.exhibits import Exhibit, Pixels, Thumbnail
from builder.verify.report.gates import FORMAT, PLACES, Gate, Report

SCHEMA = Path(__file__).parent / "schema.json"
MAX_BYTES = 1_000_000  # bytes of exhibits.json
EXHIBITS_FORMAT = 2
_IMAGE = re.compile(r"(data:image/(png|jpeg);base64,[A-Za-z0-9+/]+={0,2})?")

Verdict = Literal["passed", "partial", "failed"]


class GateFigures(BaseModel):
    """One comparison."""

    model_config = ConfigDict(extra="forbid")

    place: Annotated[str, Field(description="Where in the computation.", json_schema_extra={"enum": list(PLACES)})]
    case: Annotated[str, Field(description="What it was computed on.")]
    measured: Annotated[
        float | Literal["inf", "-inf", "nan"],
        Field(
            description="For tolerances: the largest absolute difference over the standard deviation of PyTorch's "
            "values. For exact comparisons: the number of values that differ. Text if it is not finite."
        ),
    ]
    limit: Annotated[float, Field(ge=0, description="The largest `measured` that passes; 0 for exact comparisons.")]
    detail: Annotated[str, Field(description="Where and how it differs.")]
    ok: Annotated[bool, Field(description="Whether `measured` is finite and at most `limit`.")]
    layer: Annotated[
        int | None, Field(ge=0, description="Index of the decoder layer, vision block or DeepStack level, if any.")
    ] = None


class ParityFile(BaseModel):
    """The result of verifying a bundle against PyTorch."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    format: Annotated[Literal[2], Field(description="Version of this file's format.")]
    target: Annotated[str, Field(description="The runtime that the bundle is for.")]
    checkpoint: Annotated[str, Field(description="Name of the checkpoint that the bundle was compared with.")]
    verdict: Annotated[
        Verdict, Field(description="`partial`: every comparison passed, those in `not run` were not made.")
    ]
    first_difference: Annotated[
        str | None,
        Field(alias="first difference", description="The failing gate that is earliest in the computation."),
    ]
    not_run: Annotated[dict[str, str], Field(alias="not run", description="Place → why it was not compared.")]
    gates: list[GateFigures]
    facts: Annotated[dict[str, Any], Field(description="Versions, scores, memory and other measurements.")]


def schema() -> dict[str, Any]:
    """Return the JSON Schema of parity.json."""
    model = ParityFile.model_json_schema(by_alias=True)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:qwen3vl-onnx:parity:{FORMAT}",
        **model,
    }


def parity_text(report: Report) -> str:
    """Return the text of parity.json."""
    return encodable(json.dumps(report.as_dict(), indent=1, ensure_ascii=False)) + "\n"


def exhibits_text(report: Report) -> str:
    """Return the text of exhibits.json; if too large, the last exhibits lose their images, then are left out."""
    rows = [_row(exhibit) for exhibit in report.exhibits]
    room = MAX_BYTES - 200 - sum(_bytes(row) for row in rows)
    for index in reversed(range(len(rows))):
        if room < 0:
            lighter = _row(_without_images(report.exhibits[index]))
            room += _bytes(rows[index]) - _bytes(lighter)
            rows[index] = lighter
    while room < 0:
        room += _bytes(rows.pop())
    head = f'"format":{EXHIBITS_FORMAT},"left out":{len(report.exhibits) - len(rows)}'
    return f'{{{head},"exhibits":[' + ",\n".join(rows) + "]}\n"


def _row(exhibit: Exhibit) -> str:
    return encodable(json.dumps(asdict(exhibit), ensure_ascii=False, separators=(",", ":"), allow_nan=False))


def _bytes(row: str) -> int:
    return len(row.encode("utf-8")) + 2  # with the comma and the newline


def encodable(text: str) -> str:
    """Replace lone surrogates, such as undecodable bytes of a file name, with `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _without_images(exhibit: Exhibit) -> Exhibit:
    def lighter(image: Thumbnail) -> Thumbnail:
        bare = tuple(replace(pixels, difference="", sides=()) for pixels in image.pixels)
        return replace(image, thumbnail="", pixels=bare)

    return replace(exhibit, images=tuple(map(lighter, exhibit.images)))


def read_report(evidence: Path) -> Report:
    """Read the report in a bundle's `evidence/`, without exhibits if there is no exhibits.json.

    Raises:
        BundleError: a file is missing, of another format, or malformed.
    """
    parity = _object(evidence / "parity.json", FORMAT, upgraded_parity)
    try:
        file = ParityFile.model_validate(parity)
        gates = tuple(
            Gate(gate.place, gate.case, float(gate.measured), gate.limit, gate.detail, gate.layer)
            for gate in file.gates
        )
    except (ValidationError, ValueError) as error:
        raise _unreadable(evidence / "parity.json", error) from error
    report = Report(file.target, file.checkpoint, gates, file.facts, file.not_run, _read_exhibits(evidence))
    if report.verdict != file.verdict:
        raise _unreadable(evidence / "parity.json", f"verdict {file.verdict}, but its gates give {report.verdict}")
    return report


def _read_exhibits(evidence: Path) -> tuple[Exhibit, ...]:
    path = evidence / "exhibits.json"
    if not path.is_file():
        return ()
    try:
        exhibits = TypeAdapter(tuple[Exhibit, ...]).validate_python(
            _object(path, EXHIBITS_FORMAT, _upgraded_exhibits).get("exhibits")
        )
    except ValidationError as error:
        raise _unreadable(path, error) from error
    for exhibit in exhibits:
        if not all(_IMAGE.fullmatch(uri) for uri in _images(exhibit)):
            raise _unreadable(path, f"an image of {exhibit.case[:80]!r} is not an inline PNG or JPEG")
        figures = [*exhibit.divergences, *(value for pair in exhibit.logits for value in pair)]
        if not all(map(math.isfinite, figures)):
            raise _unreadable(path, f"a figure of {exhibit.case[:80]!r} is not finite")
    return exhibits


def _images(exhibit: Exhibit) -> list[str]:
    compared: list[Pixels] = [pixels for image in exhibit.images for pixels in image.pixels]
    thumbnails = [image.thumbnail for image in exhibit.images]
    return thumbnails + [uri for pixels in compared for uri in (pixels.difference, *pixels.sides)]


def _upgraded_exhibits(document: dict[str, Any]) -> dict[str, Any]:
    return {**upgraded_keys(document), "format": EXHIBITS_FORMAT} if document.get("format") == 1 else document


def _object(path: Path, version: int, upgrade: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    try:
        document = read_json(path)
    except CheckpointError as error:
        raise BundleError(
            f"{path} cannot be read",
            expected=f"a report of format {version}",
            found=error.what,
            next="qwen3vl-onnx verify BUNDLE --reference CHECKPOINT",
        ) from error
    document = upgrade(document)
    if document.get("format") != version:
        raise BundleError(f"{path} has another format", expected=version, found=str(document.get("format"))[:80])
    return document


def _unreadable(path: Path, error: Exception | str) -> BundleError:
    first, *_ = f"{error}".splitlines() or [""]
    if isinstance(error, ValidationError):
        problem = error.errors(include_url=False, include_input=False)[0]
        first = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    return BundleError(
        f"{path} is not a report of this tool",
        expected="parity.json and exhibits.json as written by `verify`",
        found=first,
        next="qwen3vl-onnx verify BUNDLE --reference CHECKPOINT",
    )
