"""Find what differs between two bundles (`qwen3vl-onnx diff A B`).

Bundles of earlier releases can be compared too. Weights are compared by their bytes, in blocks, not by what a manifest
declares. Measurements are shown but do not count as a difference: they depend on the machine.
`builder.bundle.diff.render` formats the result.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from onnx import ModelProto

from builder.bundle.check import check_settings
from builder.bundle.diff.graphs import GraphChange, Pair, compare_graphs, differing, initializers
from builder.bundle.diff.matrices import compare_matrices, matrices, shared_matrices
from builder.bundle.diff.weights import WeightChange, compare_weights
from builder.bundle.evidence import read_parity, worst_figures
from builder.bundle.initializer import Initializer
from builder.bundle.inventory import Content, open_content
from builder.bundle.layout import load_graph
from builder.graph.introspection import readable
from builder.util.files import sha256
from builder.util.json_files import read_json
from builder.util.progress import progress

LISTED = ("files", "graphs")  # keys of a manifest that are compared file by file
GRAPHS = (".onnx", ".data", ".onnx_data")
DERIVED = ("README.md", "bom.cdx.json")  # written from the manifest: they differ only with it
MAX_TEXT = 2**20  # bytes of a file whose lines are compared
MAX_CHANGES = 1000  # that are listed per file


@dataclass(frozen=True)
class Difference:
    """Differences between two bundles; pairs are (first, second), None where absent.

    Args:
        facts: of the manifests: checkpoint, recipe, versions, patches.
        graphs: file → change, of graphs in both that differ.
        weights: weights in both that differ.
        compared: number of weights in both.
        settings: JSON file → key → values.
        files: other file → what differs.
        quality: place → worst measured value; not counted as a difference.
    """

    bundles: tuple[str, str]
    facts: Mapping[str, Pair]
    graphs: Mapping[str, GraphChange]
    weights: tuple[WeightChange, ...]
    compared: int
    settings: Mapping[str, Mapping[str, Pair]]
    files: Mapping[str, str]
    quality: Mapping[str, Pair]

    @property
    def equal(self) -> bool:
        return not (self.facts or self.graphs or self.weights or self.settings or self.files)

    def as_dict(self) -> dict[str, Any]:
        """Return the difference for JSON."""
        weights = [
            {"graph": weight.graph, "initializer": weight.name, "sha256": list(weight.digests)}
            | {"largest": _plain(weight.largest), "rms": _plain(weight.rms)}
            for weight in self.weights
        ]
        graphs = {
            name: {kind: _pairs(getattr(graph, kind)) for kind in ("opsets", "operators", "ports", "initializers")}
            | {"constants": graph.constants, "other": graph.other}
            for name, graph in self.graphs.items()
        }
        return {
            "equal": self.equal,
            "bundles": list(self.bundles),
            "facts": _pairs(self.facts),
            "graphs": graphs,
            "weights": {"compared": self.compared, "different": weights},
            "settings": {name: _pairs(values) for name, values in self.settings.items()},
            "files": dict(self.files),
            "quality": _pairs(self.quality),
        }


def diff(first: Path, second: Path) -> Difference:
    """Compare the bundles in two folders.

    Raises:
        BundleError, UnsafeError: a folder is not a complete bundle (sizes are checked, digests are not).
    """
    a, b = open_content(first), open_content(second)
    for content in (a, b):
        check_settings(content)
        _check_places(content)
    graphs, weights, compared = _graphs(a, b)
    settings, files = _files(a, b)
    found = Difference(
        bundles=(str(first), str(second)),
        facts=differing(*(dict(flat(_facts(content))) for content in (a, b))),
        graphs=graphs,
        weights=weights,
        compared=compared,
        settings=settings,
        files=files,
        quality=_quality(a, b),
    )
    return found if any((graphs, weights, settings, files)) else replace(found, files=_unexplained(a, b))


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (`a.b[0]`, value) for every value of a JSON document, empty lists and objects included."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from flat(inner, f"{path}[{index}]")
    else:
        yield path, value


def _quality(a: Content, b: Content) -> dict[str, Pair]:
    """Pair the verdicts, and each place's worst measured value, of both verifications."""
    found: list[dict[str, Any]] = []
    for content in (a, b):
        parity = read_parity(content.folder)
        found.append({} if parity is None else {"verdict": str(parity.get("verdict")), **worst_figures(parity)})
    names = [*found[0], *(name for name in found[1] if name not in found[0])]
    return {name: (found[0].get(name), found[1].get(name)) for name in names}


def _unexplained(a: Content, b: Content) -> dict[str, str]:
    """List files whose bytes differ although their contents are equal."""
    names = sorted(name for name in {*a.files} & {*b.files} if a.files[name] != b.files[name])
    return dict.fromkeys(names, "different bytes, same content in a different layout")


def _facts(content: Content) -> dict[str, Any]:
    return {key: value for key, value in content.manifest.items() if key not in LISTED}


def _check_places(content: Content) -> None:
    from builder.bundle.check_graphs import check_external

    for name in content.files:
        if name.endswith(".onnx"):
            check_external(content, name, load_graph(content.folder / name))


def _graphs(a: Content, b: Content) -> tuple[dict[str, GraphChange], tuple[WeightChange, ...], int]:
    changes: dict[str, GraphChange] = {}
    weights: list[WeightChange] = []
    compared = 0
    names = sorted(name for name in {*a.files} & {*b.files} if name.endswith(".onnx"))
    for name in names:
        models = [load_graph(content.folder / name) for content in (a, b)]
        with readable(name):
            change = compare_graphs(*models)
            found = list(_comparisons(name, models, [(content.folder / name).parent for content in (a, b)]))
        changes |= {name: change} if change.any else {}
        compared += len(found)
        with progress(f"weights of {name}", total=len(found)) as advance:
            for weight, compare in found:
                with readable(f"{name}: {weight}"):
                    different = compare()
                weights += [different] if different else []
                advance()
    return changes, tuple(weights), compared


def _comparisons(
    graph: str, models: list[ModelProto], folders: list[Path]
) -> Iterator[tuple[str, Callable[[], WeightChange | None]]]:
    """Yield each weight's name and comparison: matrices quantized in both graphs, then other shared weights."""
    quantized = [matrices(model, folder) for model, folder in zip(models, folders, strict=True)]
    shared = shared_matrices(*quantized)
    for name, pair in shared.items():
        yield name, partial(compare_matrices, graph, name, *pair)
    parts = {part.tensor.name for pair in shared.values() for matrix in pair for part in matrix.parts}
    first, second = (initializers(model) for model in models)
    for name in sorted(({*first} & {*second}) - parts):
        sides = Initializer(first[name], folders[0]), Initializer(second[name], folders[1])
        yield name, partial(compare_weights, graph, name, *sides)


def _files(a: Content, b: Content) -> tuple[dict[str, Mapping[str, Pair]], dict[str, str]]:
    """Compare JSON files by key and other files by line or size; graphs and their data are compared elsewhere."""
    settings: dict[str, Mapping[str, Pair]] = {}
    files: dict[str, str] = {}
    for name in sorted({*a.files} | {*b.files}):
        sides = [content.folder / name for content in (a, b) if name in content.files]
        if len(sides) == 1:
            files[name] = "only in the first" if name in a.files else "only in the second"
        elif name.endswith(GRAPHS) or name in DERIVED or sha256(sides[0]) == sha256(sides[1]):
            continue
        elif name.endswith(".json"):
            settings[name] = _json_change(*sides)
        else:
            files[name] = _text_change(*sides)
    return settings, files


def _json_change(first: Path, second: Path) -> dict[str, Pair]:
    found = differing(*(dict(flat(read_json(path))) for path in (first, second)))
    if not found:
        return {"": ("the same values", "in a different order or layout")}
    kept = dict(list(found.items())[:MAX_CHANGES])
    return kept | ({"…": (f"{len(found) - MAX_CHANGES} more", "")} if len(found) > MAX_CHANGES else {})


def _text_change(first: Path, second: Path) -> str:
    sizes = [path.stat().st_size for path in (first, second)]
    if max(sizes) > MAX_TEXT:
        return f"{sizes[0]:,} bytes → {sizes[1]:,} bytes"
    a, b = (path.read_bytes().decode("utf-8", "replace").splitlines() for path in (first, second))
    marks = [line[:1] for line in list(difflib.unified_diff(a, b, lineterm="", n=0))[2:]]
    return f"{marks.count('+')} lines added, {marks.count('-')} removed"


def _pairs(found: Mapping[str, Pair]) -> dict[str, list[Any]]:
    return {key: [_plain(value) for value in pair] for key, pair in found.items()}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
