"""Test parity.json, its schema, and exhibits.json, written and read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError
from typer.testing import CliRunner

from builder.cli.app import app
from builder.util.errors import BundleError
from builder.verify.report.context import Context, of_bundle
from builder.verify.report.exhibits import Exhibit, Thumbnail
from builder.verify.report.formats import MAX_BYTES, SCHEMA, exhibits_text, parity_text, read_report, schema
from builder.verify.report.gates import PLACES, Report
from builder.verify.report.write import PAGES, write
from tests.helpers.reports import failing, harmful, in_slices, passing

REPORTS = {"passing": passing, "failing": failing, "in slices": in_slices, "harmful": harmful}


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[[Report], Path]:
    """Return a function that writes a minimal bundle with a report."""

    def folder(report: Report) -> Path:
        (tmp_path / "manifest.json").write_text(json.dumps({"target": report.target, "versions": {"torch": "2.13.0"}}))
        write(report, tmp_path / "evidence", of_bundle(tmp_path))
        return tmp_path

    return folder


def published() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(SCHEMA.read_text(encoding="utf-8"))
    return found


def test_the_published_schema_is_the_models() -> None:
    assert published() == json.loads(json.dumps(schema())), (
        "write builder.verify.report.formats.schema() into schema.json"
    )
    Draft202012Validator.check_schema(published())
    assert published()["$defs"]["GateFigures"]["properties"]["place"]["enum"] == list(PLACES)


@pytest.mark.parametrize("name", REPORTS)
def test_every_report_keeps_to_it(name: str) -> None:
    written = json.loads(parity_text(REPORTS[name]()))
    Draft202012Validator(published()).validate(written)
    assert written["format"] == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.pop("verdict"),
        lambda file: file.update(verdict="fine"),
        lambda file: file.update(format=3),
        lambda file: file.update(more=1),
        lambda file: file["gates"][0].pop("limit"),
        lambda file: file["gates"][0].update(measured="many"),
        lambda file: file["gates"][0].update(place="somewhere"),
        lambda file: file["gates"][0].update(limit=-1),
        lambda file: file.update({"first difference": 3}),
    ],
    ids=range(9),
)
def test_the_schema_rejects_malformed_reports(change: Callable[[dict[str, Any]], object]) -> None:
    written = json.loads(parity_text(failing()))
    change(written)
    with pytest.raises(ValidationError):
        Draft202012Validator(published()).validate(written)


def test_a_name_that_is_not_valid_unicode_can_be_written(tmp_path: Path) -> None:
    """A file's name may be any bytes; Python gives them as lone surrogates."""
    write(harmful(), tmp_path, Context())
    assert {path.name for path in tmp_path.iterdir()} == {"parity.json", "exhibits.json", "parity.txt", *PAGES}
    assert read_report(tmp_path).verdict == "failed"


@pytest.mark.parametrize("name", ["passing", "failing", "in slices"])
def test_a_report_comes_back_the_same(name: str, tmp_path: Path) -> None:
    report = REPORTS[name]()
    write(report, tmp_path, Context())
    found = read_report(tmp_path)
    assert found.as_dict() == report.as_dict()
    assert found.exhibits == report.exhibits


def test_a_report_written_before_gates_had_a_layer_is_read(tmp_path: Path) -> None:
    write(passing(), tmp_path, Context())
    written = json.loads((tmp_path / "parity.json").read_text())
    assert {gate.pop("layer", None) for gate in written["gates"]} == {None, 0, 1, 2, 3}
    (tmp_path / "parity.json").write_text(json.dumps(written))
    assert {gate.layer for gate in read_report(tmp_path).gates} == {None}


def test_exhibits_stay_below_their_size() -> None:
    """Images of the last cases are dropped first, and the file counts the cases left out."""
    image = Thumbnail("noise.png", "data:image/png;base64," + "A" * 30_000)
    many = tuple(Exhibit(f"case {n}", "case", "a prompt", (image,)) for n in range(60))
    text = exhibits_text(replace(passing(), exhibits=many))
    assert len(text.encode()) < MAX_BYTES
    found = json.loads(text)
    assert (len(found["exhibits"]), found["left out"]) == (60, 0)
    kept = [bool(exhibit["images"][0]["thumbnail"]) for exhibit in found["exhibits"]]
    assert kept == sorted(kept, reverse=True)
    assert 25 < sum(kept) < 40

    words = tuple(Exhibit(f"case {n}", "case", "é" * 300) for n in range(3000))
    text = exhibits_text(replace(passing(), exhibits=words))
    assert len(text.encode()) < MAX_BYTES
    found = json.loads(text)
    assert len(found["exhibits"]) + found["left out"] == 3000
    assert found["left out"] > 0


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda parity, _: parity.update(format=3), "3"),
        (lambda parity, _: parity.update(verdict="passed"), "verdict passed, but its gates give failed"),
        (lambda parity, _: parity["gates"][0].update(place="nowhere"), "is not a place"),
        (lambda parity, _: parity["gates"][0].update(measured=[]), "measured"),
        (lambda parity, _: parity.pop("gates"), "gates"),
        (lambda _, shown: shown["exhibits"][0]["images"][0].update(thumbnail="https://example.org/x.png"), "image"),
        (lambda _, shown: shown["exhibits"][0]["images"][0].update(thumbnail="data:image/svg+xml,<svg/>"), "image"),
        (lambda _, shown: shown["exhibits"][0].update(divergences=["inf"]), "finite"),
        (lambda _, shown: shown["exhibits"][0].update(images=7), "images"),
        (lambda _, shown: shown.update(exhibits=None), ""),
    ],
    ids=range(10),
)
def test_modified_files_are_refused_with_a_reason(
    bundle: Callable[[Report], Path], change: Callable[[dict[str, Any], dict[str, Any]], object], found: str
) -> None:
    folder = bundle(failing())
    paths = [folder / "evidence" / name for name in ("parity.json", "exhibits.json")]
    files = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    change(*files)
    for path, file in zip(paths, files, strict=True):
        path.write_text(json.dumps(file))
    with pytest.raises(BundleError) as caught:
        read_report(folder / "evidence")
    assert found in str(caught.value.found)


def test_the_command_rebuilds_the_pages(bundle: Callable[[Report], Path], tmp_path: Path) -> None:
    folder = bundle(failing())
    before = {name: (folder / "evidence" / name).read_bytes() for name in PAGES}
    for name in PAGES:
        (folder / "evidence" / name).unlink()
    done = CliRunner().invoke(app, ["report", str(folder)])
    assert done.exit_code == 0, done.output
    assert {name: (folder / "evidence" / name).read_bytes() for name in PAGES} == before
    assert done.stdout.splitlines() == [str(folder / "evidence" / name) for name in PAGES]

    files = {option: tmp_path / "made" / option for option in ("html", "junit", "markdown")}
    options = [word for option, file in files.items() for word in (f"--{option}", str(file))]
    done = CliRunner().invoke(app, ["report", str(folder), *options, "--json"])
    assert done.exit_code == 0, done.output
    assert [file.read_bytes() for file in files.values()] == [
        before[name] for name in ("report.html", "junit.xml", "report.md")
    ]
    assert json.loads(done.stdout)["first difference"].startswith("decoder layers")


def test_the_command_reports_what_is_missing(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert (done.exit_code, "manifest.json" in done.stderr) == (BundleError.exit_code, True)
    (tmp_path / "manifest.json").write_text("{}")
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert (done.exit_code, "parity.json" in done.stderr) == (BundleError.exit_code, True)
    write(passing(), tmp_path / "evidence", Context())
    done = CliRunner().invoke(app, ["report", str(tmp_path), "--html", str(tmp_path / "manifest.json" / "a.html")])
    assert done.exit_code == 19
