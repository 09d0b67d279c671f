"""Our own command line, measured.

In: a checkpoint and an output folder. Out: `Run`s, and the `Cost` of each stage as its record has it.
Guaranteed: each command is a process of its own, as a user starts it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.measure import Run, run
from builder.stages.engine.output_folder import RECORD, read_record
from builder.util.cost import Cost

BUILDER = (sys.executable, "-m", "builder")


def build(checkpoint: Path | None, output: Path, *arguments: object) -> Run:
    """`qwen3vl-onnx build`, at fp32; without a checkpoint, the miniature's."""
    named = [] if checkpoint is None else [checkpoint]
    return run([*BUILDER, "build", *named, "--recipe", "fp32", "--output", output, "--json", *arguments])


def stages(output: Path) -> dict[str, Cost]:
    """Stage → cost, in the order of the pipeline; only those that are there."""
    folders = sorted(file.parent for file in output.glob(f"*/{RECORD}"))
    records = [record for folder in folders if (record := read_record(folder))]
    return {record.stage: record.cost for record in records}


def seconds_in(done: Run, stage: str) -> tuple[float, str]:
    """What a build spent in a stage, 0 where it left it as it was; and what it says of it."""
    step = next((one for one in _json(done).get("stages", []) if one["stage"] == stage), None)
    if step is None:
        return 0.0, f"no stage {stage}"
    return (0.0 if step["state"] == "cached" else step["wall_s"]), step["state"]


def data_files(output: Path) -> list[Path]:
    """The weights that a build wrote, each file once; largest first."""
    found = sorted(output.glob("*-quantize/**/*.data"), reverse=True)
    files = {file.stat().st_ino: file for file in found}  # the first of two names of one file stays
    return sorted(files.values(), key=lambda file: -file.stat().st_size)


def _json(done: Run) -> dict[str, Any]:
    try:
        content = json.loads(done.output)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
