"""Stage 5: write the weights, at the recipe's precision.

In: optimized graphs with bindings, and the checkpoint. Out: each `<graph>.onnx`, the `.onnx.data` files that they refer
to, and `digests.json`. Guaranteed: fp32 is the identity but for the cast; every checkpoint tensor is used by every
target, and none is missing; no two graphs of a target hold the same bytes (the embeddings refer to the decoder's file
where its head is tied to them), and equal data files of two targets are one file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_ir.passes.common import RemoveUnusedNodesPass

from builder.checkpoint.load import Checkpoint
from builder.graph.binding import BoundGraph, load
from builder.graph.data_files import fill
from builder.graph.external_data import DIGESTS
from builder.graph.naming import rename
from builder.graph.passes.convert_precision import convert_precision
from builder.graph.passes.quantize_weights import quantize_weights
from builder.graph.quantized_data import CalibratedRows
from builder.quantization.activation_ranges import MAGNITUDES, Range, activation_ranges, wide_layers
from builder.quantization.rules import WeightFormat, resolve
from builder.stages.fetch import check_unchanged
from builder.targets.graphs import GRAPHS, components
from builder.util.errors import PassError, WeightError
from builder.util.progress import progress

if TYPE_CHECKING:
    from builder.stages.engine.build import Build

CALIBRATED = "calibrated"
MEGABYTE = 10**6
SCALES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # of quantized matrices: the activations' type


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
                layers, ports = wide.get(path.stem, frozenset()), GRAPHS[runtime].wide_ports
                graphs[path] = stored(path, bound, precision, storages, layers, ports)
        _check_complete(checkpoint, runtime, graphs.values(), storages)
    given = calibrated_rows(checkpoint, storages, out / CALIBRATED)
    with progress("weights, MB", sum(tensor.nbytes for tensor in checkpoint.tensors.values()) // MEGABYTE) as advance:
        apart = [GRAPHS[runtime].own_data for runtime in targets]
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


def calibrated_rows(checkpoint: Checkpoint, storages: Mapping[str, WeightFormat], folder: Path) -> CalibratedRows:
    """What calibration finds, read from `folder` when it is written; nothing where nothing is calibrated."""
    if not any(one.blocks.search == "gptq" for one in storages.values()):
        return {}
    from builder.quantization.calibrate import calibrated, load

    with progress("calibrate, layers", checkpoint.text.layers + 1) as advance:
        files = calibrated(checkpoint, storages, folder, advance)
    return {name: partial(load, path) for name, path in files.items()}


def stored(
    path: Path,
    bound: BoundGraph,
    precision: str,
    storages: Mapping[str, WeightFormat],
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
        bound = convert_precision(bound, precision, wide, wide_ports).graph
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
            next="run `qwen3vl-onnx patches`: an upstream change alters what is traced",
        )
    left = sorted(set(checkpoint.tensors) - used)
    if left:
        raise WeightError(
            f"{len(left)} checkpoint tensors are in no graph of the target {runtime}",
            expected="every tensor in at least one graph",
            found=", ".join(left[:5]) + (" …" if len(left) > 5 else ""),
        )
