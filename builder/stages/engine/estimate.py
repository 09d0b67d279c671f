"""Estimate bytes, memory and time of each stage from a checkpoint's config and tensor index.

Sizes of data files are exact; all else is an order of magnitude, on the safe side (`builder.stages.engine.measured`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from builder.checkpoint.parts import DECODER, EMBEDDINGS, VISION
from builder.checkpoint.safetensors import INDEX, Tensor
from builder.checkpoint.shard_reader import BLOCK
from builder.checkpoint.tensors import EMBEDDINGS as EMBEDDING_MATRIX
from builder.graph.external_data import QUEUED, STRIP, padded
from builder.quantization.packing import part_shape, parts
from builder.quantization.rules import WeightFormat
from builder.stages.engine import measured
from builder.targets.graphs import GRAPHS
from builder.verify.memory_budget import ITEM, LAYERS, Mode, verify_memory

if TYPE_CHECKING:
    from builder.checkpoint.config import Text, Vision


ITEMS = {"fp32": 4, "fp16": 2, "bf16": 2}  # bytes per value
FUSED = re.compile(r"(?<=\.)(?:[qkv]_proj|gate_proj|up_proj)(?=\.)")
VISUAL = "model.visual."


@dataclass(frozen=True)
class Stored:
    """Weight formats by tensor (`builder.quantization.rules.resolve`), and the precision of all other tensors."""

    storages: Mapping[str, WeightFormat] = field(default_factory=dict)
    precision: str = "fp32"

    @property
    def exact(self) -> bool:
        return not self.storages and self.precision == "fp32"

    @property
    def calibrated(self) -> bool:
        return any(storage.blocks.search == "gptq" for storage in self.storages.values())


FP32 = Stored()


@dataclass(frozen=True)
class Facts:
    """A checkpoint's architecture and files, without its weights.

    Args:
        text, vision: see `builder.checkpoint.config`.
        tensors: those of `builder.checkpoint.tensors.expected_tensors`, by name; offsets in files are not used.
        files: file that a build needs → bytes.
        missing: file to download → bytes.
    """

    text: Text
    vision: Vision
    tensors: Mapping[str, Tensor]
    files: Mapping[str, int]
    missing: Mapping[str, int]


@dataclass(frozen=True)
class GraphBytes:
    """Sizes of a target's graph.

    Args:
        graph: name of the graph file.
        graph_bytes: approximate size of that file.
        data: name of its data file.
        data_bytes: exact size of the data file; 0 if it is counted for another graph.
    """

    target: str
    graph: str
    graph_bytes: int
    data: str
    data_bytes: int


@dataclass(frozen=True)
class StageCost:
    """Bytes that a stage writes to the output folder, its peak memory in bytes, and its seconds."""

    written: int
    memory: int
    seconds: float


def graph_bytes(facts: Facts, runtimes: Iterable[str], stored: Stored = FP32) -> tuple[GraphBytes, ...]:
    """Estimate every graph of every target; equal data files are stored once, and counted for the first target."""
    vision = [name for name in facts.tensors if name.startswith(VISUAL)]
    elsewhere = {*vision} if facts.text.tied else {*vision, EMBEDDING_MATRIX}
    decoder = [name for name in facts.tensors if name not in elsewhere]
    rows = []
    counted: set[frozenset[str]] = set()
    for runtime in runtimes:
        embeddings = [] if facts.text.tied and not GRAPHS[runtime].own_data else [EMBEDDING_MATRIX]
        for graph, names, depth in (
            (VISION, vision, facts.vision.depth),
            (EMBEDDINGS, embeddings, 1),
            (DECODER, decoder, facts.text.layers),
        ):
            data = f"{graph if names else DECODER}.onnx.data"
            known = frozenset(names) in counted
            size = 0 if known else data_bytes((facts.tensors[name] for name in names), stored)
            counted.add(frozenset(names))
            rows.append(GraphBytes(runtime, f"{graph}.onnx", depth * measured.LAYER_BYTES, data, size))
    return tuple(rows)


def data_bytes(tensors: Iterable[Tensor], stored: Stored = FP32) -> int:
    """Return the bytes of a data file with these tensors (`builder.graph.external_data.layout`)."""
    item, total = ITEMS[stored.precision], 0
    groups: dict[tuple[str, WeightFormat], tuple[int, int]] = {}
    for tensor in tensors:
        storage = stored.storages.get(tensor.name)
        if storage is None:
            total += padded(math.prod(tensor.shape) * item)
        else:  # fused matrices are stored together (builder/graph/passes/quantize_weights.py)
            key = FUSED.sub("_", tensor.name), storage
            rows, columns = tensor.shape
            groups[key] = groups.get(key, (0, columns))[0] + rows, columns
    for (_, storage), (rows, columns) in groups.items():
        for part in parts(storage.blocks):
            shape = part_shape(part, storage.blocks, rows, columns)
            total += padded(math.prod(shape) * (item if part == "scales" else 1))
    return total


def stage_cost(stage: str, facts: Facts, runtimes: Sequence[str], mode: Mode, stored: Stored = FP32) -> StageCost:
    """Estimate the cost of running a stage for the targets `runtimes`, if `verify` runs in `mode`."""
    rows = graph_bytes(facts, runtimes, stored)
    graphs, data = sum(row.graph_bytes for row in rows), sum(row.data_bytes for row in rows)
    weights = sum(math.prod(tensor.shape) for tensor in facts.tensors.values())
    written = measured.RECORD_BYTES
    memory, seconds = measured.STAGES[stage]
    match stage:
        case "fetch":
            seconds += sum(facts.missing.values()) / measured.HASH_RATE
        case "export":
            written += graphs
            seconds += len(runtimes) * measured.TRACE_SECONDS
        case "optimize":
            written += graphs
        case "quantize":
            written += graphs + data
            memory += _quantize_memory(facts, stored)
            rate = measured.CALIBRATE_RATE if stored.calibrated else measured.QUANTIZE_RATE
            seconds += data / measured.WRITE_RATE + (weights / rate if stored.storages else 0)
        case "configure":
            small = (size for name, size in facts.files.items() if not name.endswith(".safetensors") and name != INDEX)
            written += len(runtimes) * sum(small)
        case "verify":
            # The fp32 copy of the bundle, while it is compared.
            written += 0 if stored.exact else ITEM * weights
            complete, sliced = verify_memory(facts)
            memory, rate = (complete, measured.WHOLE_SECONDS) if mode == "whole" else (sliced, measured.SLICED_SECONDS)
            seconds += len(runtimes) * (measured.VERIFY_SECONDS + rate * (ITEM * weights / 1e9))
    return StageCost(written, memory, seconds)


def _quantize_memory(facts: Facts, stored: Stored) -> int:
    """Memory of a transposed strip and the queued blocks or, calibrated, of a layer and its inputs' Hessians."""
    layers = [tensor for name, tensor in facts.tensors.items() if name.startswith(LAYERS)]
    if stored.calibrated:
        columns = max(tensor.shape[1] for tensor in facts.tensors.values() if len(tensor.shape) == 2)
        layer = max(ITEM * math.prod(tensor.shape) for tensor in layers)
        return measured.PROMPT_BYTES + 3 * layer + measured.HESSIANS * ITEM * columns**2
    transposed = max(tensor.nbytes for tensor in layers if len(tensor.shape) == 2)
    return min(STRIP, transposed) + (QUEUED + 4) * BLOCK
