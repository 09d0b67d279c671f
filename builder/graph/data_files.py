"""Assign initializers to data files, and write both with the graphs that refer to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from builder.checkpoint.load import Checkpoint
from builder.graph.binding import Binding, BoundGraph
from builder.graph.external_data import DataFile, write_data
from builder.graph.quantized_data import CalibratedRows
from builder.util.files import link


@dataclass(frozen=True)
class DataFiles:
    """The data files of several graphs.

    Args:
        contents: data file → the contents to write to it.
        links: data file → the data file of the same contents that it is linked to.
    """

    contents: Mapping[Path, Sequence[Binding]]
    links: Mapping[Path, Path]


def fill(
    targets: Sequence[Mapping[Path, BoundGraph]],
    checkpoint: Checkpoint,
    on_read: Callable[[int], None] = lambda _: None,
    calibrated: CalibratedRows | None = None,
    separate: Sequence[bool] = (),
) -> tuple[Mapping[Path, DataFile], Mapping[str, str]]:
    """Write each target's graphs to their paths, and their data files next to them.

    Args:
        targets: for each target, path → graph.
        on_read: called with the number of bytes of each tensor once it is written.
        calibrated: see `builder.graph.quantized_data.QuantizationSource`.
        separate: for each target, whether its graphs must not share data files.

    Returns:
        Every data file, and the SHA-256 of every checkpoint file that was read.
    """
    plan = plan_data_files(targets, separate)
    for path in plan.contents:
        path.parent.mkdir(parents=True, exist_ok=True)
    written = write_data(plan.contents, checkpoint, on_read, calibrated)
    files = dict(written.files)
    for path, original in plan.links.items():
        link(original, path)
        files[path] = files[original]
    for graphs in targets:
        folder = {path: files[path] for path in map(data_path, graphs) if path in files}
        for path, bound in graphs.items():
            own = {data: folder[data] for data in (data_path(path),) if data in folder}
            _write_graph(bound, path, own | folder)
    return files, written.shards


def plan_data_files(targets: Sequence[Mapping[Path, BoundGraph]], separate: Sequence[bool] = ()) -> DataFiles:
    """Assign each content to the data file of the last graph of its target that reads it, or of each such graph."""
    contents: dict[Path, Sequence[Binding]] = {}
    links: dict[Path, Path] = {}
    known: dict[frozenset[Binding], Path] = {}
    for graphs, each in zip(targets, separate or [False] * len(targets), strict=True):
        placed: set[Binding] = set()
        for path, bound in reversed(list(graphs.items())):
            own = {binding.content for binding in bound.bindings.values()} - placed
            placed |= set() if each else own
            if not own:
                continue
            if (original := known.setdefault(frozenset(own), data_path(path))) == data_path(path):
                contents[original] = sorted(own, key=lambda content: content.tensor)
            else:
                links[data_path(path)] = original
    return DataFiles(contents, links)


def data_path(path: Path) -> Path:
    """The data file of the graph at `path`."""
    return path.with_name(path.name + ".data")


def _write_graph(bound: BoundGraph, path: Path, folder: Mapping[Path, DataFile]) -> None:
    """Write the graph with its initializers pointing into the data files of its folder."""
    for binding in bound.bindings.values():
        content = binding.content
        data, (offset, length) = next(
            (data, file.placements[content]) for data, file in folder.items() if content in file.placements
        )
        value = bound.model.graph.initializers[binding.initializer]
        placeholder = value.const_value
        assert isinstance(placeholder, ir.ExternalTensor)
        value.const_value = ir.ExternalTensor(
            data.name,
            offset,
            length,
            placeholder.dtype,
            shape=ir.Shape(binding.stored_shape),
            name=binding.initializer,
            base_dir=path.parent,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(ir.to_proto(bound.model).SerializeToString(deterministic=True))
