"""parity.json and exhibits.json: how they are written, what they look like, how they are read back.

In: a `Report`. Out: its text, and the same report again. Guaranteed: parity.json keeps to `schema.json`, which is made
from the models here; exhibits.json stays below `MAX_BYTES` bytes; a file
that does not keep to its model, or holds an image that is anything but a small image, is a `BundleError`.
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
            "values. For exact comparisons: how many values differ. As text where it is no finite number."
        ),
    ]
    limit: Annotated[float, Field(ge=0, description="The largest figure that passes; 0 for exact comparisons.")]
    detail: Annotated[str, Field(description="Where and how it differs.")]
    ok: Annotated[bool, Field(description="Whether `measured` is finite and at most `limit`.")]
    layer: Annotated[
        int | None, Field(ge=0, description="Index of the decoder layer, vision block or DeepStack level, if any.")
    ] = None


class ParityFile(BaseModel):
    """What a verification of a bundle against PyTorch found."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    format: Annotated[Literal[2], Field(description="Version of this file's format.")]
    target: Annotated[str, Field(description="The runtime that the bundle is for.")]
    checkpoint: Annotated[str, Field(description="Name of the checkpoint that it was compared with.")]
    verdict: Annotated[Verdict, Field(description="`partial`: all that was compared holds, `not run` could not be.")]
    first_difference: Annotated[
        str | None,
        Field(alias="first difference", description="The failing gate that comes first in the computation."),
    ]
    not_run: Annotated[dict[str, str], Field(alias="not run", description="Place → why it was not compared.")]
    gates: list[GateFigures]
    facts: Annotated[dict[str, Any], Field(description="Versions, scores, memory: what was found besides.")]


def schema() -> dict[str, Any]:
    """The JSON Schema of parity.json."""
    made = ParityFile.model_json_schema(by_alias=True)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:qwen3vl-onnx:parity:{FORMAT}",
        **made,
    }


def parity_text(report: Report) -> str:
    """parity.json."""
    return encodable(json.dumps(report.as_dict(), indent=1, ensure_ascii=False)) + "\n"


def exhibits_text(report: Report) -> str:
    """exhibits.json; the last exhibits lose their images where it would be too large, and then go altogether."""
    rows = [_row(one) for one in report.exhibits]
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
    return len(row.encode("utf-8")) + 2  # with the comma and the line's end


def encodable(text: str) -> str:
    """The same with `?` for what is no Unicode: the bytes of a file's name, say."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _without_images(exhibit: Exhibit) -> Exhibit:
    def lighter(image: Thumbnail) -> Thumbnail:
        bare = tuple(replace(one, difference="", sides=()) for one in image.pixels)
        return replace(image, thumbnail="", pixels=bare)

    return replace(exhibit, images=tuple(lighter(one) for one in exhibit.images))


def read_report(evidence: Path) -> Report:
    """The report in a bundle's `evidence/`; without exhibits where exhibits.json is not there.

    Raises:
        BundleError: a file that is missing, of another format, or not what it should be.
    """
    parity = _object(evidence / "parity.json", FORMAT, upgraded_parity)
    try:
        found = ParityFile.model_validate(parity)
        gates = tuple(
            Gate(gate.place, gate.case, float(gate.measured), gate.limit, gate.detail, gate.layer)
            for gate in found.gates
        )
    except (ValidationError, ValueError) as error:
        raise _unreadable(evidence / "parity.json", error) from error
    report = Report(found.target, found.checkpoint, gates, found.facts, found.not_run, _read_exhibits(evidence))
    if report.verdict != found.verdict:
        raise _unreadable(evidence / "parity.json", f"verdict {found.verdict}, but its gates say {report.verdict}")
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
            raise _unreadable(path, f"an image of {exhibit.case[:80]!r} is no image")
        figures = [*exhibit.divergences, *(value for pair in exhibit.logits for value in pair)]
        if not all(map(math.isfinite, figures)):
            raise _unreadable(path, f"a figure of {exhibit.case[:80]!r} is no finite number")
    return exhibits


def _images(exhibit: Exhibit) -> list[str]:
    pixels: list[Pixels] = [one for image in exhibit.images for one in image.pixels]
    shown = [one.thumbnail for one in exhibit.images]
    return shown + [uri for one in pixels for uri in (one.difference, *one.sides)]


def _upgraded_exhibits(document: dict[str, Any]) -> dict[str, Any]:
    return {**upgraded_keys(document), "format": EXHIBITS_FORMAT} if document.get("format") == 1 else document


def _object(path: Path, version: int, upgrade: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    try:
        found = read_json(path)
    except CheckpointError as error:
        raise BundleError(
            f"{path} cannot be read",
            expected=f"a report of format {version}",
            found=error.what,
            next="qwen3vl-onnx verify BUNDLE --reference CHECKPOINT",
        ) from error
    found = upgrade(found)
    if found.get("format") != version:
        raise BundleError(f"{path} has another format", expected=version, found=str(found.get("format"))[:80])
    return found


def _unreadable(path: Path, error: Exception | str) -> BundleError:
    first, *_ = f"{error}".splitlines() or [""]
    if isinstance(error, ValidationError):
        one = error.errors(include_url=False, include_input=False)[0]
        first = f"{'.'.join(map(str, one['loc']))}: {one['msg']}"
    return BundleError(
        f"{path} is no report of this tool",
        expected="parity.json and exhibits.json as `verify` wrote them",
        found=first,
        next="qwen3vl-onnx verify BUNDLE --reference CHECKPOINT",
    )
