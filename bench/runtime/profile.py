"""Profile the decoder of an onnxruntime-genai folder: `python -m bench.runtime.profile FOLDER --threads N`.

Prints a table of milliseconds per operator, for a decode step and both prefills; time outside operators has its own
lines.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from bench.runtime.figures import PROMPTS, STEPS
from bench.runtime.folders import CONFIG, with_threads
from bench.runtime.genai import generate, prompt

BETWEEN, OUTSIDE = "between operators", "outside the session"
STEP = "a decode step"


@dataclass(frozen=True)
class Spent:
    """Milliseconds of a run of the decoder: operator → time, and the total."""

    operators: Mapping[str, float]
    total: float


def runs(events: Sequence[Mapping[str, Any]]) -> list[Spent]:
    """Split a profile of ONNX Runtime into the runs of the session, in order.

    Args:
        events: in microseconds; a node's interval is within its run's.
    """
    bounds = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event.get("name") == "model_run")
    nodes = sorted(
        (event["ts"], event["dur"], event["args"]["op_name"])
        for event in events
        if event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time")
    )
    found, place = [], 0
    for begin, end in bounds:
        spent: Counter[str] = Counter()
        while place < len(nodes) and nodes[place][0] < end:
            at, duration, operator = nodes[place]
            if at >= begin:
                spent[operator] += duration / 1e3
            place += 1
        total = (end - begin) / 1e3
        found.append(Spent({**spent, BETWEEN: total - sum(spent.values())}, total))
    return found


def mean(each: Sequence[Spent], wall_ms: float) -> Spent:
    """Return the mean of several runs; the rest of `wall_ms` is `OUTSIDE`."""
    names = dict.fromkeys(name for spent in each for name in spent.operators)
    operators = {name: fmean(spent.operators.get(name, 0.0) for spent in each) for name in names}
    return Spent({**operators, OUTSIDE: wall_ms - fmean(spent.total for spent in each)}, wall_ms)


def table(columns: Mapping[str, Spent]) -> str:
    """Render a line per operator, in descending order of the first column: milliseconds and share."""
    first = next(iter(columns.values()))
    names = sorted(
        dict.fromkeys(name for column in columns.values() for name in column.operators),
        key=lambda name: -first.operators.get(name, 0.0),
    )
    lines = ["| ms | " + " | ".join(f"{name} | " for name in columns) + " |", "|---" + "|--:|--:" * len(columns) + "|"]
    for name in names:
        cells = [(column.operators.get(name, 0.0), column.total) for column in columns.values()]
        lines.append(
            f"| {name} | " + " | ".join(f"{spent:,.2f} | {spent / total:.0%}" for spent, total in cells) + " |"
        )
    totals = " | ".join(f"{column.total:,.2f} | " for column in columns.values())
    return "\n".join([*lines, f"| **all** | {totals} |"])


def profile(folder: Path, threads: int) -> dict[str, Spent]:
    """Return column → time, for a model that has answered before."""
    import onnxruntime_genai as og

    short, long = map(prompt, PROMPTS)
    with TemporaryDirectory(dir=folder.parent) as scratch:
        copy = with_threads(folder, Path(scratch) / "folder", threads)
        config = json.loads((copy / CONFIG).read_bytes())
        config["model"]["decoder"]["session_options"]["enable_profiling"] = str(Path(scratch) / "profile")
        (copy / CONFIG).write_text(json.dumps(config))
        model = og.Model(str(copy))
        sum(generate(og, model, short, 2))
        walls = [[1e3 * spent for spent in generate(og, model, *each)] for each in ((short, STEPS + 1), (long, 1))]
        del model
        time.sleep(1)
        events = json.loads(next(Path(scratch).glob("profile*")).read_bytes())
    prefilled, *steps, longer = runs(events)[2:]
    (first, *rest), (last,) = walls
    return {
        STEP: mean(steps, fmean(rest)),
        f"prefill of {PROMPTS[0]}": mean([prefilled], first),
        f"prefill of {PROMPTS[1]:,}": mean([longer], last),
    }


def main(folder: Path, threads: Annotated[int, typer.Option(min=1)] = 1) -> None:
    """Profile the decoder of an artifact."""
    print(table(profile(folder.resolve(), threads)))


if __name__ == "__main__":
    typer.run(main)
