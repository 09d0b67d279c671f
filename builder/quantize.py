"""Stage 5: write the weights, at the recipe's precision.

In: optimized graphs with bindings, and the checkpoint. Out: each `<graph>.onnx` with its `<graph>.onnx.data`.
Guaranteed: fp32 is the identity but for the cast; every checkpoint tensor is used by every target, and none is missing;
equal data files (two targets, one architecture) are written once and linked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from builder import graph
from builder.checkpoint import Checkpoint
from builder.console import progress
from builder.contract import components
from builder.errors import WeightError
from builder.files import link
from builder.graph import BoundGraph
from builder.weights import DataFile, write_data

if TYPE_CHECKING:
    from builder.stage import Build


def run(build: Build, out: Path) -> Mapping[str, object]:
    """Returns size and SHA-256 of every data file."""
    facts: dict[str, object] = {}
    written: dict[str, tuple[Path, DataFile]] = {}
    jobs = [(t, c) for t in build.recipe.targets for c in components(build.checkpoint, t.runtime)]
    used: dict[str, set[str]] = {}
    with progress("weights", len(jobs)) as advance:
        for target, component in jobs:
            name = f"{target.runtime}/{component.file}"
            bound = graph.load(build.folder("optimize") / name)
            used.setdefault(target.runtime, set()).update(b.tensor for b in bound.bindings.values())
            data = fill(bound, build.checkpoint, out / name, written)
            facts[f"{name}.data"] = {"bytes": data.size, "sha256": data.sha256}
            advance()
    for runtime, tensors in used.items():
        _check_complete(build.checkpoint, runtime, tensors)
    return facts


def fill(bound: BoundGraph, checkpoint: Checkpoint, path: Path, written: dict[str, tuple[Path, DataFile]]) -> DataFile:
    """Writes the graph at `path` and its data beside it, or links the data of an equal graph in `written`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data_path = path.with_name(path.name + ".data")
    bindings = [bound.bindings[name] for name in sorted(bound.bindings)]
    rows = [{**asdict(binding), "initializer": index} for index, binding in enumerate(bindings)]
    key = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    if key in written:
        source, data = written[key]
        link(source, data_path)
    else:
        data = write_data(bindings, checkpoint, data_path)
        written[key] = data_path, data
    for binding, placement in zip(bindings, data.placements, strict=True):
        value = bound.model.graph.initializers[binding.initializer]
        stand_in = value.const_value
        assert isinstance(stand_in, ir.ExternalTensor)
        value.const_value = ir.ExternalTensor(
            data_path.name,
            placement.offset,
            placement.length,
            stand_in.dtype,
            shape=ir.Shape(binding.stored_shape),
            name=binding.initializer,
            base_dir=path.parent,
        )
    path.write_bytes(ir.to_proto(bound.model).SerializeToString(deterministic=True))
    return data


def _check_complete(checkpoint: Checkpoint, runtime: str, used: set[str]) -> None:
    left = sorted(set(checkpoint.tensors) - used)
    if left:
        raise WeightError(
            f"{len(left)} checkpoint tensors are in no graph of the target {runtime}",
            expected="every tensor in at least one graph",
            found=", ".join(left[:5]) + (" …" if len(left) > 5 else ""),
        )
