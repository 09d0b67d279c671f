"""Run a command and measure its cost from outside.

The writes of earlier commands are flushed before the clock starts. A command that fails, or is killed for its memory,
is a result; its message contains no folders of this machine.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from builder.util.cost import Cost

ROOT = Path(__file__).parents[1]
_FRAME = " │"  # around error messages of typer
_FOLDERS = re.compile(r"(?:/[\w.@+~-]+)+/")


@dataclass(frozen=True)
class Run:
    """A finished process.

    Args:
        cost: `peak_rss` is that of the largest process among it and its children that it waited for. Bytes read and
            written are unknown.
        failure: its exit status and the last line of its stderr; None if it succeeded.
        output: its stdout.
    """

    cost: Cost
    failure: str | None
    output: str


def run(command: Sequence[object], *, cwd: Path = ROOT, settings: Mapping[str, str] | None = None) -> Run:
    """Run `command` and wait for it.

    Args:
        cwd: its working directory.
        settings: additional environment variables.
    """
    os.sync()
    with TemporaryFile() as out, TemporaryFile() as err:
        begin = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env={**os.environ, **(settings or {})},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            preexec_fn=_go_first,
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        wall = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        peak = usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024
        cost = Cost(round(wall, 3), round(usage.ru_utime + usage.ru_stime, 3), peak, None, None)
        failure = failed(process.returncode, err.read().decode(errors="replace")) if process.returncode else None
        return Run(cost, failure, out.read().decode(errors="replace"))


def failed(code: int, stderr: str) -> str:
    """Describe a failure: `exit 1: MemoryError`, or `killed by SIGKILL: …`."""
    lines = [line.strip(_FRAME) for line in stderr.splitlines() if re.search(r"\w", line)]
    how = f"exit {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    return how + (f": {_FOLDERS.sub('…/', lines[-1])}" if lines else "")


def typical(costs: Iterable[Cost]) -> Cost:
    """Return the median of each figure, and the highest peak."""
    runs = list(costs)
    return Cost(
        wall_s=statistics.median(cost.wall_s for cost in runs),
        cpu_s=statistics.median(cost.cpu_s for cost in runs),
        peak_rss=_highest(runs),
        read=_median(cost.read for cost in runs),
        written=_median(cost.written for cost in runs),
    )


def total(costs: Iterable[Cost]) -> Cost:
    """Return the cost of running all of them in sequence: sums, and the highest peak."""
    runs = list(costs)
    return Cost(
        wall_s=sum(cost.wall_s for cost in runs),
        cpu_s=sum(cost.cpu_s for cost in runs),
        peak_rss=_highest(runs),
        read=sum(cost.read or 0 for cost in runs),
        written=sum(cost.written or 0 for cost in runs),
    )


def _highest(costs: Iterable[Cost]) -> int | None:
    return max((cost.peak_rss for cost in costs if cost.peak_rss is not None), default=None)


def _median(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return int(statistics.median(known)) if known else None


def _go_first() -> None:
    """Make this process the first that the kernel kills when memory runs out."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
