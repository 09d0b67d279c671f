"""What one machine took: every measured constant of an estimate. What verify itself goes by is in memory_budget.py.

Unless a line says otherwise: 2 x86-64 cores with other work on them, builds of the miniature and of a checkpoint of
141 million weights. docs/bench.md has builds of 2B, 4B and 8B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Fixed(NamedTuple):
    """What a stage takes whatever the checkpoint: peak bytes with all that earlier stages imported, and seconds."""

    memory: int
    seconds: float


STAGES: Mapping[str, Fixed] = {
    "fetch": Fixed(200_000_000, 1),
    "patch": Fixed(400_000_000, 5),
    "export": Fixed(600_000_000, 0),
    "optimize": Fixed(600_000_000, 1),
    "quantize": Fixed(650_000_000, 1),
    "configure": Fixed(600_000_000, 1),
    "verify": Fixed(0, 0),
    "bundle": Fixed(600_000_000, 2),
}
# Bytes.
LAYER_BYTES = 20_000  # a layer's part of a graph and its bindings: 10,000 (filled) to 23,000 (traced)
RECORD_BYTES = 200_000  # what a stage writes besides: records, diffs, settings, reports
PROMPT_BYTES = 300_000_000  # calibration: the residual streams of all prompts
HESSIANS = 8  # calibration: fp32 copies of one Hessian, [columns, columns]
# Seconds of a target.
TRACE_SECONDS = 27  # whatever the size: 50 to 59 for two targets at 2B, 4B and 8B (docs/bench.md)
VERIFY_SECONDS = 30
# Seconds of a target for 1e9 bytes of fp32 weights.
WHOLE_SECONDS = 180  # all cases, 64 tokens each: 242 s for two targets at 0.57e9 bytes
SLICED_SECONDS = 9  # three cases: 7.4 at 2B, 8.4 at 8B
# Bytes a second.
WRITE_RATE = 0.25e9  # a data file, cast, hashed and flushed, on a slow disk
HASH_RATE = 0.35e9  # a download read back from that disk; not measured, SHA-256 alone does 2e9
# Weights a second.
QUANTIZE_RATE, CALIBRATE_RATE = 40e6, 4e6
