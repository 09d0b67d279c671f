"""Which data file holds which initializer, and the graphs that refer to it."""

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
    """Where the contents of several graphs lie.

    Args:
        wanted: data file → what is to be written there.
        twins: data file → the equal one that is written in its place.
    """

    wanted: Mapping[Path, Sequence[Binding]]
    twins: Mapping[Path, Path]


def fill(
    targets: Sequence[Mapping[Path, BoundGraph]],
    checkpoint: Checkpoint,
    on_read: Callable[[int], None] = lambda _: None,
    given: CalibratedRows | None = None,
    apart: Sequence[bool] = (),
) -> tuple[Mapping[Path, DataFile], Mapping[str, str]]:
    """Writes each target's graphs at their paths, and the data that they refer to beside them.

    Args:
        apart: of each target, whether no graph of it may refer to another's data.

    Returns every data file, and the SHA-256 of every checkpoint file that was read.
    """
    plan = shared_out(targets, apart)
    for path in plan.wanted:
        path.parent.mkdir(parents=True, exist_ok=True)
    written = write_data(plan.wanted, checkpoint, on_read, given)
    files = dict(written.files)
    for path, twin in plan.twins.items():
        link(twin, path)
        files[path] = files[twin]
    for graphs in targets:
        folder = {path: files[path] for path in map(data_path, graphs) if path in files}
        for path, bound in graphs.items():
            first = {one: folder[one] for one in (data_path(path),) if one in folder}
            _refer(bound, path, first | folder)
    return files, written.shards


def shared_out(targets: Sequence[Mapping[Path, BoundGraph]], apart: Sequence[bool] = ()) -> DataFiles:
    """Which content lies in which file: that of the last graph of its target which reads it, or of each."""
    wanted: dict[Path, Sequence[Binding]] = {}
    twins: dict[Path, Path] = {}
    known: dict[frozenset[Binding], Path] = {}
    for graphs, each in zip(targets, apart or [False] * len(targets), strict=True):
        placed: set[Binding] = set()
        for path, bound in reversed(list(graphs.items())):
            own = {binding.content for binding in bound.bindings.values()} - placed
            placed |= set() if each else own
            if not own:
                continue
            if (twin := known.setdefault(frozenset(own), data_path(path))) == data_path(path):
                wanted[twin] = sorted(own, key=lambda content: content.tensor)
            else:
                twins[data_path(path)] = twin
    return DataFiles(wanted, twins)


def data_path(path: Path) -> Path:
    """Where the data of the graph at `path` lies, as far as it is its own."""
    return path.with_name(path.name + ".data")


def _refer(bound: BoundGraph, path: Path, folder: Mapping[Path, DataFile]) -> None:
    """Writes the graph, its initializers pointing into the data files of its folder."""
    for binding in bound.bindings.values():
        data, (offset, length) = next(
            (data, one.placements[binding.content]) for data, one in folder.items() if binding.content in one.placements
        )
        value = bound.model.graph.initializers[binding.initializer]
        stand_in = value.const_value
        assert isinstance(stand_in, ir.ExternalTensor)
        value.const_value = ir.ExternalTensor(
            data.name,
            offset,
            length,
            stand_in.dtype,
            shape=ir.Shape(binding.stored_shape),
            name=binding.initializer,
            base_dir=path.parent,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(ir.to_proto(bound.model).SerializeToString(deterministic=True))
