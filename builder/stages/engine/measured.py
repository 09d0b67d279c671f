"""Measured constants of the estimate. Those that verify itself uses are in memory_budget.py.

Unless noted: 2 shared x86-64 cores, builds of the miniature and of a checkpoint with 141 million weights. docs/bench.md
has builds of 2B, 4B and 8B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Fixed(NamedTuple):
    """Cost of a stage for any checkpoint: peak bytes, including imports of earlier stages, and seconds."""

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
LAYER_BYTES = 20_000  # of graph and bindings per layer: 10,000 (filled) to 23,000 (traced)
RECORD_BYTES = 200_000  # records, diffs, settings and reports of a stage
PROMPT_BYTES = 300_000_000  # calibration: residual streams of all prompts
HESSIANS = 8  # calibration: fp32 copies of one Hessian, [columns, columns]
# Seconds per target.
TRACE_SECONDS = 27  # for any size: 50 to 59 for two targets at 2B, 4B and 8B (docs/bench.md)
VERIFY_SECONDS = 30
# Seconds per target and 1e9 bytes of fp32 weights.
WHOLE_SECONDS = 180  # all cases, 64 tokens each: 242 s for two targets at 0.57e9 bytes
SLICED_SECONDS = 9  # three cases: 7.4 at 2B, 8.4 at 8B
# Bytes per second.
WRITE_RATE = 0.25e9  # a data file, cast, hashed and flushed, on a slow disk
HASH_RATE = 0.35e9  # reading a download back; not measured, SHA-256 alone runs at 2e9
# Weights per second.
QUANTIZE_RATE, CALIBRATE_RATE = 40e6, 4e6
