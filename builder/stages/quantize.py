"""Stage 5: write the weights, at the recipe's precision.

In: optimized graphs with bindings, and the checkpoint. Out: each `<graph>.onnx`, the `.onnx.data` files that they refer
to, and `digests.json`. Guaranteed: fp32 is the identity but for the cast; every checkpoint tensor is used by every
target, and none is missing; no two graphs of a target hold the same bytes (the embeddings refer to the decoder's file
where its head is tied to them), and equal data files of two targets are one file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from builder.checkpoint.load import Checkpoint
from builder.graph.binding import Binding, BoundGraph, load
from builder.graph.external_data import DIGESTS, DataFile, write_data
from builder.graph.passes.convert_precision import narrow
from builder.graph.passes.quantize_weights import quantize_weights
from builder.graph.ports import components
from builder.graph.quantized_data import Given
from builder.quantization.activation_ranges import MAGNITUDES, Range, activation_ranges, wide_layers
from builder.quantization.rules import Storage, resolve
from builder.stages.fetch import check_unchanged
from builder.stages.optimize import rename
from builder.targets.registry import TARGETS
from builder.util.errors import PassError, WeightError
from builder.util.files import link
from builder.util.progress import progress

if TYPE_CHECKING:
    from builder.stages.engine.build import Build

CALIBRATED = "calibrated"
MEGABYTE = 10**6
SCALES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # of quantized matrices: the activations' type


@dataclass(frozen=True)
class DataFiles:
    """Where the contents of several graphs lie.

    Args:
        wanted: data file → what is to be written there.
        twins: data file → the equal one that is written in its place.
    """

    wanted: Mapping[Path, Sequence[Binding]]
    twins: Mapping[Path, Path]


def run(build: Build, out: Path) -> Mapping[str, object]:
    """Returns size and SHA-256 of every data file, by its path under `out`."""
    checkpoint = build.checkpoint
    targets = {
        target.runtime: {
            out / target.runtime / one.file: load(build.folder("optimize") / target.runtime / one.file)
            for one in components(checkpoint, target.runtime)
        }
        for target in build.recipe.targets
    }
    precision, storages = build.recipe.precision, resolve(build.recipe.rules, checkpoint.tensors)
    ranges = _ranges(checkpoint) if precision == "fp16" else []
    wide = wide_layers(ranges)
    for runtime, graphs in targets.items():
        if not build.recipe.exact:
            for path, bound in graphs.items():
                layers, ports = wide.get(path.stem, frozenset()), TARGETS[runtime].wide_ports
                graphs[path] = stored(path, bound, precision, storages, layers, ports)
        _check_complete(checkpoint, runtime, graphs.values(), storages)
    given = calibrated_rows(checkpoint, storages, out / CALIBRATED)
    with progress("weights, MB", sum(tensor.nbytes for tensor in checkpoint.tensors.values()) // MEGABYTE) as advance:
        apart = [TARGETS[runtime].apart for runtime in targets]
        files, shards = fill(list(targets.values()), checkpoint, lambda count: advance(count // MEGABYTE), given, apart)
    shutil.rmtree(out / CALIBRATED, ignore_errors=True)
    check_unchanged(build, shards)
    facts = {
        path.relative_to(out).as_posix(): {"bytes": data.size, "sha256": data.sha256} for path, data in files.items()
    }
    found: dict[str, object] = {"data": facts, "checkpoint": shards}
    if ranges:
        found[MAGNITUDES] = [asdict(one) | {"wide": one.wide} for one in ranges]
    text = json.dumps(found, indent=1, sort_keys=True)
    (out / DIGESTS).write_text(text + "\n", encoding="utf-8")
    return dict(facts)


def calibrated_rows(checkpoint: Checkpoint, storages: Mapping[str, Storage], folder: Path) -> Given:
    """What calibration finds, read from `folder` when it is written; nothing where nothing is calibrated."""
    if not any(one.blocks.search == "gptq" for one in storages.values()):
        return {}
    from builder.quantization.calibrate import calibrated, load

    with progress("calibrate, layers", checkpoint.text.layers + 1) as advance:
        files = calibrated(checkpoint, storages, folder, advance)
    return {name: partial(load, path) for name, path in files.items()}


def fill(
    targets: Sequence[Mapping[Path, BoundGraph]],
    checkpoint: Checkpoint,
    on_read: Callable[[int], None] = lambda _: None,
    given: Given | None = None,
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


def stored(
    path: Path,
    bound: BoundGraph,
    precision: str,
    storages: Mapping[str, Storage],
    wide: frozenset[int] = frozenset(),
    wide_ports: frozenset[str] = frozenset(),
) -> BoundGraph:
    """The graph with matrices quantized as the rules say, and everything else in the recipe's precision.

    Args:
        path: of the graph, for errors.
        wide: layers that stay fp32.
        wide_ports: inputs and outputs that do, whatever the precision.

    Raises:
        PassError: a rule names a weight that cannot be quantized.
    """
    if storages:
        outcome = quantize_weights(bound, storages, SCALES[precision])
        if outcome.misses:
            raise PassError(
                f"a rule names a weight of {path.name} that cannot be quantized",
                expected="weights of linear layers, and embeddings",
                found=outcome.misses[0],
                next='put a rule before it that keeps it: store = "keep"',
            )
        bound = outcome.graph
    if precision != "fp32":
        bound = narrow(bound, precision, wide, wide_ports).graph
    RemoveUnusedNodesPass()(bound.model)
    rename(bound)
    return bound


def _ranges(checkpoint: Checkpoint) -> list[Range]:
    """Of every layer; PyTorch runs it, a layer in memory at a time."""
    from builder.reference.model import Reference

    return activation_ranges(Reference(checkpoint, streamed=True))


def _check_complete(
    checkpoint: Checkpoint, runtime: str, graphs: Iterable[BoundGraph], storages: Iterable[str]
) -> None:
    bindings = [binding for bound in graphs for binding in bound.bindings.values()]
    used = {name for binding in bindings for name in binding.tensors}
    kept = sorted(set(storages) - {name for one in bindings if one.blocks for name in one.tensors})
    if kept:
        raise WeightError(
            f"{len(kept)} matrices were not quantized for the target {runtime}",
            expected="every matrix that a rule names",
            found=", ".join(kept[:5]) + (" …" if len(kept) > 5 else ""),
            next="run `python -m builder patches`: an upstream change alters what is traced",
        )
    left = sorted(set(checkpoint.tensors) - used)
    if left:
        raise WeightError(
            f"{len(left)} checkpoint tensors are in no graph of the target {runtime}",
            expected="every tensor in at least one graph",
            found=", ".join(left[:5]) + (" …" if len(left) > 5 else ""),
        )
