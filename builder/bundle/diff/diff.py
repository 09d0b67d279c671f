"""`qwen3vl-onnx diff A B`: what differs between two bundles.

In: two bundles' folders. Out: a `Difference`, as JSON; `builder.bundle.diff.render` writes it for people. Guaranteed:
what an
earlier release wrote can be compared too; weights are compared by their bytes, never by what a manifest says of them,
and are not taken into memory; measured figures are shown and make no difference: they come from a machine, not from
the bundle.
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

LISTED = ("files", "graphs")  # of a manifest: compared by what they list
GRAPHS = (".onnx", ".data", ".onnx_data")
DERIVED = ("README.md", "bom.cdx.json")  # from the manifest: they differ where something else does
TEXT = 2**20  # bytes of a file whose lines are compared
MOST = 1000  # changes of one file that are told


@dataclass(frozen=True)
class Difference:
    """What differs; pairs are (in the one, in the other), None where it is not there.

    Args:
        facts: what a manifest says but for its lists: checkpoint, recipe, versions, patches.
        graphs: of both, by file; only those that differ.
        weights: that are in both and differ; `compared` says how many were in both.
        settings: file → key → values, of JSON files.
        files: other files → what differs.
        quality: place → the worst figure measured; makes no difference.
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
        """For JSON."""
        weights = [
            {"graph": one.graph, "initializer": one.name, "sha256": list(one.digests)}
            | {"largest": _plain(one.largest), "rms": _plain(one.rms)}
            for one in self.weights
        ]
        graphs = {
            name: {kind: _pairs(getattr(one, kind)) for kind in ("opsets", "operators", "ports", "initializers")}
            | {"constants": one.constants, "other": one.other}
            for name, one in self.graphs.items()
        }
        return {
            "equal": self.equal,
            "bundles": list(self.bundles),
            "facts": _pairs(self.facts),
            "graphs": graphs,
            "weights": {"compared": self.compared, "different": weights},
            "settings": {name: _pairs(one) for name, one in self.settings.items()},
            "files": dict(self.files),
            "quality": _pairs(self.quality),
        }


def diff(one: Path, other: Path) -> Difference:
    """What differs between the bundles in two folders.

    Raises:
        BundleError, UnsafeError: one is no bundle, or not whole; sizes are compared, digests are not.
    """
    a, b = open_content(one), open_content(other)
    for content in (a, b):
        check_settings(content)
        _check_places(content)
    graphs, weights, compared = _graphs(a, b)
    settings, files = _files(a, b)
    found = Difference(
        bundles=(str(one), str(other)),
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
    """`a.b[0]` → value, for every value of a JSON document; an empty list or object is a value."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from flat(inner, f"{path}[{index}]")
    else:
        yield path, value


def _quality(a: Content, b: Content) -> dict[str, Pair]:
    """The verdict, and each place's worst figure, of both verifications; None where there is none."""
    found: list[dict[str, Any]] = []
    for content in (a, b):
        parity = read_parity(content.folder)
        found.append({} if parity is None else {"verdict": str(parity.get("verdict")), **worst_figures(parity)})
    names = [*found[0], *(name for name in found[1] if name not in found[0])]
    return {name: (found[0].get(name), found[1].get(name)) for name in names}


def _unexplained(a: Content, b: Content) -> dict[str, str]:
    """Files of other bytes in which no difference was found."""
    names = sorted(name for name in {*a.files} & {*b.files} if a.files[name] != b.files[name])
    return dict.fromkeys(names, "other bytes; the same content, laid out otherwise")


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
            for one, compare in found:
                with readable(f"{name}: {one}"):
                    different = compare()
                weights += [different] if different else []
                advance()
    return changes, tuple(weights), compared


def _comparisons(
    graph: str, models: list[ModelProto], folders: list[Path]
) -> Iterator[tuple[str, Callable[[], WeightChange | None]]]:
    """Name → what compares it: matrices that are quantized in both graphs, and all other weights of both."""
    quantized = [matrices(model, folder) for model, folder in zip(models, folders, strict=True)]
    whole = shared_matrices(*quantized)
    for name, pair in whole.items():
        yield name, partial(compare_matrices, graph, name, *pair)
    parts = {part.tensor.name for pair in whole.values() for matrix in pair for part in matrix.parts}
    one, other = (initializers(model) for model in models)
    for name in sorted(({*one} & {*other}) - parts):
        sides = Initializer(one[name], folders[0]), Initializer(other[name], folders[1])
        yield name, partial(compare_weights, graph, name, *sides)


def _files(a: Content, b: Content) -> tuple[dict[str, Mapping[str, Pair]], dict[str, str]]:
    """JSON files by key; others by what can be said of them. Graphs and their data have been compared."""
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


def _json_change(one: Path, other: Path) -> dict[str, Pair]:
    found = differing(*(dict(flat(read_json(path))) for path in (one, other)))
    if not found:
        return {"": ("the same values", "in another order or layout")}
    kept = dict(list(found.items())[:MOST])
    return kept | ({"…": (f"{len(found) - MOST} more", "")} if len(found) > MOST else {})


def _text_change(one: Path, other: Path) -> str:
    sizes = [path.stat().st_size for path in (one, other)]
    if max(sizes) > TEXT:
        return f"{sizes[0]:,} bytes → {sizes[1]:,} bytes"
    a, b = (path.read_bytes().decode("utf-8", "replace").splitlines() for path in (one, other))
    marks = [line[:1] for line in list(difflib.unified_diff(a, b, lineterm="", n=0))[2:]]
    return f"{marks.count('+')} lines added, {marks.count('-')} removed"


def _pairs(found: Mapping[str, Pair]) -> dict[str, list[Any]]:
    return {key: [_plain(value) for value in pair] for key, pair in found.items()}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
