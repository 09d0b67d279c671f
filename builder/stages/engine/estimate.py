"""What a build would write, hold in memory and take, from a checkpoint's config and tensor index alone.

In: `Facts` about a checkpoint, runtimes, stages. Out: bytes and seconds. Guaranteed: no weight is read; sizes of data
files are exact, all other figures are an order of magnitude on the safe side (see the constants).
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
from builder.targets.graphs import GRAPHS
from builder.verify.memory_budget import ITEM, LAYERS, Mode, verify_memory

if TYPE_CHECKING:
    from builder.checkpoint.config import Text, Vision


ITEMS = {"fp32": 4, "fp16": 2, "bf16": 2}  # and of one in a data file that no rule quantizes
SIDE_BY_SIDE = re.compile(r"(?<=\.)(?:[qkv]_proj|gate_proj|up_proj)(?=\.)")
VISUAL = "model.visual."

# Measured, unless they say otherwise, on 2 x86-64 cores with other work on them: builds of the miniature and of a
# checkpoint of 141 million weights.
LAYER_BYTES = 20_000  # of a graph and its bindings, a layer or vision block: 10,000 (filled) to 23,000 (traced)
RECORD_BYTES = 200_000  # what a stage writes beside that: records, diffs, settings, reports
# Peak bytes; what earlier stages of the same process have imported stays.
STAGE_MEMORY: Mapping[str, int] = {
    "fetch": 200_000_000,
    "patch": 400_000_000,
    "export": 600_000_000,
    "optimize": 600_000_000,
    "quantize": 650_000_000,  # and what `_quantize_memory` adds
    "configure": 600_000_000,
    "bundle": 600_000_000,
}
STAGE_SECONDS: Mapping[str, float] = {"fetch": 1, "patch": 5, "optimize": 1, "quantize": 1, "configure": 1, "bundle": 2}
TRACE_SECONDS = 27  # a target, whatever its size: 50 to 59 for both at 2B, 4B and 8B (docs/bench.md)
WRITE_RATE = 0.25e9  # bytes a second of a data file, cast, hashed and flushed, on a slow disk
HASH_RATE = 0.35e9  # not measured: a download read back from the same disk; SHA-256 alone does 2e9
QUANTIZE_RATE, CALIBRATE_RATE = 40e6, 4e6  # weights a second
CALIBRATION_MEMORY, MOMENTS = 300_000_000, 8  # bytes of the prompts' streams; copies of a matrix of moments, as fp32
VERIFY_SECONDS = 30  # a target
# Seconds a target and a gigabyte of fp32 weights, all cases with 64 tokens each: from 242 s for two targets at 0.57 GB.
WHOLE_SECONDS = 180
# The same in slices, where three cases are asked: 7.4 at 2B, 8.4 at 8B.
SLICED_SECONDS = 9


@dataclass(frozen=True)
class Stored:
    """How a recipe stores weights: what `builder.quantization.rules.resolve` gives, and the precision of all else."""

    storages: Mapping[str, WeightFormat] = field(default_factory=dict)
    precision: str = "fp32"

    @property
    def exact(self) -> bool:
        return not self.storages and self.precision == "fp32"

    @property
    def calibrated(self) -> bool:
        return any(one.blocks.search == "gptq" for one in self.storages.values())


FP32 = Stored()


@dataclass(frozen=True)
class Facts:
    """What is known of a checkpoint before a weight is read.

    Args:
        text, vision: see `builder.checkpoint.config`.
        tensors: by name, exactly those of `builder.checkpoint.tensors.expected_tensors`; places in files do not matter.
        files: every file that a build needs → bytes.
        missing: those of them that are to be downloaded.
    """

    text: Text
    vision: Vision
    tensors: Mapping[str, Tensor]
    files: Mapping[str, int]
    missing: Mapping[str, int]


@dataclass(frozen=True)
class GraphBytes:
    """One graph of one target.

    Args:
        graph: its file.
        graph_bytes: of that file, about.
        data: the data file that it reads.
        data_bytes: of that file, exactly, where this graph brings it along; 0 where it is another's.
    """

    target: str
    graph: str
    graph_bytes: int
    data: str
    data_bytes: int


@dataclass(frozen=True)
class StageCost:
    """Bytes that a stage writes into the output folder, its peak of memory in bytes, and its seconds."""

    written: int
    memory: int
    seconds: float


def graph_bytes(facts: Facts, runtimes: Iterable[str], stored: Stored = FP32) -> tuple[GraphBytes, ...]:
    """Every graph of every target; equal data files are on disk once, and count for the first target."""
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
            rows.append(GraphBytes(runtime, f"{graph}.onnx", depth * LAYER_BYTES, data, size))
    return tuple(rows)


def data_bytes(tensors: Iterable[Tensor], stored: Stored = FP32) -> int:
    """Bytes of the data file that holds these tensors (`builder.graph.external_data.layout`)."""
    item, total = ITEMS[stored.precision], 0
    groups: dict[tuple[str, WeightFormat], tuple[int, int]] = {}
    for tensor in tensors:
        storage = stored.storages.get(tensor.name)
        if storage is None:
            total += padded(math.prod(tensor.shape) * item)
        else:  # matrices that become one product lie together (builder/graph/passes/quantize_weights.py)
            key = SIDE_BY_SIDE.sub("_", tensor.name), storage
            rows, columns = tensor.shape
            groups[key] = groups.get(key, (0, columns))[0] + rows, columns
    for (_, storage), (rows, columns) in groups.items():
        for part in parts(storage.blocks):
            shape = part_shape(part, storage.blocks, rows, columns)
            total += padded(math.prod(shape) * (item if part == "scales" else 1))
    return total


def stage_cost(stage: str, facts: Facts, runtimes: Sequence[str], mode: Mode, stored: Stored = FP32) -> StageCost:
    """What one run of a stage costs.

    Args:
        stage: its name.
        runtimes: of the recipe's targets.
        mode: how `verify` would run.
        stored: how weights are stored.
    """
    return StageCost(
        written=_written(stage, facts, runtimes, stored),
        memory=_memory(stage, facts, mode, stored),
        seconds=_seconds(stage, facts, runtimes, mode, stored),
    )


def _written(stage: str, facts: Facts, runtimes: Sequence[str], stored: Stored) -> int:
    filled = graph_bytes(facts, runtimes, stored)
    graphs = sum(row.graph_bytes for row in filled)
    small = sum(size for name, size in facts.files.items() if not name.endswith(".safetensors") and name != INDEX)
    own = {
        "export": graphs,
        "optimize": graphs,
        "quantize": graphs + sum(row.data_bytes for row in filled),
        "configure": len(runtimes) * small,
        # The checkpoint that the bundle is, in fp32, while it is compared.
        "verify": 0 if stored.exact else ITEM * _weights(facts),
    }
    return own.get(stage, 0) + RECORD_BYTES


def _weights(facts: Facts) -> int:
    return sum(math.prod(tensor.shape) for tensor in facts.tensors.values())


def _memory(stage: str, facts: Facts, mode: Mode, stored: Stored) -> int:
    if stage == "verify":
        whole, sliced = verify_memory(facts)
        return whole if mode == "whole" else sliced
    return STAGE_MEMORY.get(stage, 0) + (_quantize_memory(facts, stored) if stage == "quantize" else 0)


def _quantize_memory(facts: Facts, stored: Stored) -> int:
    """The strip that is turned, and the blocks on their way to the disk; or a layer, and the moments of its inputs."""
    if stored.calibrated:
        columns = max(one.shape[1] for one in facts.tensors.values() if len(one.shape) == 2)
        layer = max(ITEM * math.prod(one.shape) for name, one in facts.tensors.items() if name.startswith(LAYERS))
        return CALIBRATION_MEMORY + 3 * layer + MOMENTS * ITEM * columns**2
    turned = (one.nbytes for one in facts.tensors.values() if one.name.startswith(LAYERS) and len(one.shape) == 2)
    return min(STRIP, max(turned)) + (QUEUED + 4) * BLOCK


def _seconds(stage: str, facts: Facts, runtimes: Sequence[str], mode: Mode, stored: Stored) -> float:
    if stage == "export":
        return len(runtimes) * TRACE_SECONDS
    if stage == "verify":
        gigabytes = ITEM * sum(math.prod(tensor.shape) for tensor in facts.tensors.values()) / 1e9
        rate = WHOLE_SECONDS if mode == "whole" else SLICED_SECONDS
        return len(runtimes) * (VERIFY_SECONDS + rate * gigabytes)
    passing = {
        "fetch": sum(facts.missing.values()) / HASH_RATE,
        "quantize": sum(row.data_bytes for row in graph_bytes(facts, runtimes, stored)) / WRITE_RATE
        + (len(stored.storages) > 0) * _weights(facts) / (CALIBRATE_RATE if stored.calibrated else QUANTIZE_RATE),
    }
    return STAGE_SECONDS.get(stage, 0) + passing.get(stage, 0)
