"""Collect what a report shows besides the comparison: provenance, costs of the stages, results of the self-test.

Guarantees: missing or malformed entries of manifest.json and evidence/ are skipped and never fail a report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.util.errors import BundleError, CheckpointError
from builder.util.files import sha256
from builder.util.json_files import read_json
from builder.util.text import figure
from builder.util.units import size

MANIFEST, STAGES, SELF_TEST = "manifest.json", "stages", "self_test.json"
_STAGES = ("fetch", "patch", "export", "optimize", "quantize", "configure", "verify")

_UNSHOWN = ("detail", "at")  # columns of the self-test that repeat the place and the case
_TITLES = {"survivors": "Thresholds"}  # of the tables in self_test.json
_SIGNS = {"caught": "✓ caught", "does not apply": "does not apply"}  # of a mutant

Rows = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Table:
    """A title, column names, and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: Rows


@dataclass(frozen=True)
class MeasuredStage:
    """Wall-clock seconds and peak memory in bytes (None if unknown) of a stage."""

    name: str
    seconds: float
    memory: int | None


@dataclass(frozen=True)
class Context:
    """What a report shows besides its gates; empty where unknown.

    Args:
        facts: (name, value) pairs that identify what was compared.
        tables: packages, patches, files.
        stages: in the order in which they ran.
        self_test: results of `verify --self-test`.
    """

    facts: tuple[tuple[str, str], ...] = ()
    tables: tuple[Table, ...] = ()
    stages: tuple[MeasuredStage, ...] = ()
    self_test: tuple[Table, ...] = ()


def of_bundle(bundle: Path) -> Context:
    """Read the context from a bundle's manifest.json and evidence/.

    Raises:
        BundleError: the folder has no manifest.
    """
    if not (bundle / MANIFEST).is_file():
        raise BundleError(f"{bundle} is not a bundle", expected=f"{MANIFEST} in it", next="qwen3vl-onnx build")
    evidence = bundle / "evidence"
    manifest = _read(bundle / MANIFEST)
    return Context(
        facts=(*_manifest_facts(manifest), ("manifest.json", f"sha256 {sha256(bundle / MANIFEST)}")),
        tables=_manifest_tables(manifest),
        stages=_costs([(name, evidence / STAGES / f"{name}.json") for name in _STAGES]),
        self_test=_self_test(_read(evidence / SELF_TEST)),
    )


def _manifest_facts(manifest: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    checkpoint, recipe = _mapping(manifest.get("checkpoint")), _mapping(manifest.get("recipe"))
    known = (
        ("checkpoint", checkpoint.get("name")),
        ("revision", checkpoint.get("revision")),
        ("config.json", checkpoint.get("config_sha256") and f"sha256 {checkpoint['config_sha256']}"),
        ("target", manifest.get("target")),
        ("attention", manifest.get("attention")),
        ("opset", manifest.get("opset")),
        ("recipe", ", ".join(f"{key} {value}" for key, value in recipe.items())),
    )
    return tuple((name, _text(value)) for name, value in known if value not in (None, ""))


def _manifest_tables(manifest: Mapping[str, Any]) -> tuple[Table, ...]:
    checkpoint = _mapping(manifest.get("checkpoint"))
    patches = {name: _mapping(patch) for name, patch in _mapping(manifest.get("patches")).items()}
    tables = (
        Table(
            "Patches of transformers",
            ("patch", "of", "why"),
            tuple(
                (name, _text(patch.get("target", "")), _text(patch.get("why", ""))) for name, patch in patches.items()
            ),
        ),
        Table("Built with", ("package", "version"), _pairs(manifest.get("versions"))),
        Table("Files of the bundle", ("file", "size", "sha256"), _files(manifest.get("files"))),
        Table("Files of the checkpoint", ("file", "size", "sha256"), _files(checkpoint.get("files"))),
    )
    return tuple(table for table in tables if table.rows)


def _files(files: object) -> Rows:
    rows = []
    for name, entry in _mapping(files).items():
        bytes_, digest = _mapping(entry).get("size"), _mapping(entry).get("sha256", "")
        rows.append((name, size(bytes_) if isinstance(bytes_, int) else "", _text(digest)))
    return tuple(rows)


def _pairs(entries: object) -> Rows:
    return tuple((name, _text(value)) for name, value in _mapping(entries).items())


def _costs(records: Sequence[tuple[str, Path]]) -> tuple[MeasuredStage, ...]:
    stages = []
    for name, path in records:
        cost = _mapping(_read(path).get("cost"))
        seconds, memory = cost.get("wall_s"), cost.get("peak_rss")
        if isinstance(seconds, int | float) and 0 <= seconds < float("inf"):
            known = memory if isinstance(memory, int) and memory >= 0 else None
            stages.append(MeasuredStage(name, float(seconds), known))
    return tuple(stages)


def _self_test(document: Mapping[str, Any]) -> tuple[Table, ...]:
    """Turn each list of objects into a table; columns that are empty throughout are left out."""
    tables = []
    for title, rows in document.items():
        listed = [_mapping(row) for row in rows] if isinstance(rows, list) else []
        columns = tuple(dict.fromkeys(key for row in listed for key in row if key not in _UNSHOWN and row[key] != ""))
        if columns:
            cells = tuple(tuple(_cell(key, row.get(key, "")) for key in columns) for row in listed)
            tables.append(Table(_TITLES.get(title, title.capitalize()), columns, cells))
    return tuple(tables)


def _cell(column: str, value: object) -> str:
    text = _text(value)
    return _SIGNS.get(text, f"✗ {text}") if column == "status" and text else text


def _read(path: Path) -> Mapping[str, Any]:
    """Read the JSON object in a file; empty if it is missing or malformed."""
    try:
        return read_json(path) if path.is_file() else {}
    except CheckpointError:
        return {}


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return figure(value)
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "" if value is None else str(value)
