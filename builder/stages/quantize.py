"""Stage 5: write the weights at the recipe's precision, quantized as its rules say.

Writes each `<graph>.onnx`, the `.onnx.data` files that they refer to, and `digests.json`.

Guarantees: fp32 only casts; every checkpoint tensor is used by every target; no two graphs of a target store the same
bytes (tied embeddings refer to the decoder's file); equal data files of two targets are one file.
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
SCALES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # dtype of scales: the activations' dtype


def run(build: Build, out: Path) -> Mapping[str, object]:
    """Write all graphs and data files, and return each data file's size and SHA-256, by path under `out`."""
    checkpoint = build.checkpoint
    targets = {
        target.runtime: {
            out / target.runtime / component.file: load(build.folder("optimize") / target.runtime / component.file)
            for component in components(checkpoint, target.runtime)
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
    rows = calibrated_rows(checkpoint, storages, out / CALIBRATED)
    with progress("weights, MB", sum(tensor.nbytes for tensor in checkpoint.tensors.values()) // MEGABYTE) as advance:
        separate = [GRAPHS[runtime].own_data for runtime in targets]
        files, shards = fill(
            list(targets.values()), checkpoint, lambda count: advance(count // MEGABYTE), rows, separate
        )
    shutil.rmtree(out / CALIBRATED, ignore_errors=True)
    check_unchanged(build, shards)
    facts = {
        path.relative_to(out).as_posix(): {"bytes": data.size, "sha256": data.sha256} for path, data in files.items()
    }
    found: dict[str, object] = {"data": facts, "checkpoint": shards}
    if ranges:
        found[MAGNITUDES] = [asdict(layer) | {"wide": layer.wide} for layer in ranges]
    text = json.dumps(found, indent=1, sort_keys=True)
    (out / DIGESTS).write_text(text + "\n", encoding="utf-8")
    return dict(facts)


def calibrated_rows(checkpoint: Checkpoint, storages: Mapping[str, WeightFormat], folder: Path) -> CalibratedRows:
    """Calibrate the matrices that the recipe says, in `folder`; each result is read when it is written."""
    if not any(storage.blocks.search == "gptq" for storage in storages.values()):
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
    """Quantize the graph's matrices as the rules say, and convert the rest to the recipe's precision.

    Args:
        path: of the graph, for errors.
        wide: layers that stay fp32.
        wide_ports: inputs and outputs that stay fp32.

    Raises:
        PassError: a rule selects a weight that cannot be quantized.
    """
    if storages:
        outcome = quantize_weights(bound, storages, SCALES[precision])
        if outcome.misses:
            raise PassError(
                f"a rule selects a weight of {path.name} that cannot be quantized",
                expected="weights of linear layers, and embeddings",
                found=outcome.misses[0],
                next='add a rule before it that keeps it: store = "keep"',
            )
        bound = outcome.graph
    if precision != "fp32":
        bound = convert_precision(bound, precision, wide, wide_ports).graph
    RemoveUnusedNodesPass()(bound.model)
    rename(bound)
    return bound


def _ranges(checkpoint: Checkpoint) -> list[Range]:
    """Measure every layer's activations in PyTorch, with one layer in memory at a time."""
    from builder.reference.model import Reference

    return activation_ranges(Reference(checkpoint, streamed=True))


def _check_complete(
    checkpoint: Checkpoint, runtime: str, graphs: Iterable[BoundGraph], storages: Iterable[str]
) -> None:
    bindings = [binding for bound in graphs for binding in bound.bindings.values()]
    used = {name for binding in bindings for name in binding.tensors}
    kept = sorted(set(storages) - {name for binding in bindings if binding.blocks for name in binding.tensors})
    if kept:
        raise WeightError(
            f"{len(kept)} matrices were not quantized for the target {runtime}",
            expected="every matrix that a rule selects",
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
