"""Run and measure our own command line, each command in its own process, as a user starts it."""

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
    """Run `qwen3vl-onnx build` at fp32; without a checkpoint, build the miniature."""
    named = [] if checkpoint is None else [checkpoint]
    return run([*BUILDER, "build", *named, "--recipe", "fp32", "--output", output, "--json", *arguments])


def stages(output: Path) -> dict[str, Cost]:
    """Return stage → cost from the stage records that exist, in the order of the pipeline."""
    folders = sorted(file.parent for file in output.glob(f"*/{RECORD}"))
    records = [record for folder in folders if (record := read_record(folder))]
    return {record.stage: record.cost for record in records}


def seconds_in(done: Run, stage: str) -> tuple[float, str]:
    """Return the seconds that a build spent in a stage (0 if cached), and the state it reports."""
    step = next((step for step in _json(done).get("stages", []) if step["stage"] == stage), None)
    if step is None:
        return 0.0, f"no stage {stage}"
    return (0.0 if step["state"] == "cached" else step["wall_s"]), step["state"]


def data_files(output: Path) -> list[Path]:
    """Return the weight files that a build wrote, each once, largest first."""
    paths = sorted(output.glob("*-quantize/**/*.data"), reverse=True)
    files = {path.stat().st_ino: path for path in paths}  # of two links to a file, the first name
    return sorted(files.values(), key=lambda file: -file.stat().st_size)


def _json(done: Run) -> dict[str, Any]:
    try:
        content = json.loads(done.output)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
