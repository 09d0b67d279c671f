"""In: a command. Out: a `Run`: what the process cost, seen from outside, and how it ended.

Guaranteed: what earlier commands wrote is on the disk before the clock starts; a command that fails, or is killed for
its memory, is a result; nothing of this machine's folders is in the words that say so.
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
_FRAME = " │"  # of what typer says
_FOLDERS = re.compile(r"(?:/[\w.@+~-]+)+/")


@dataclass(frozen=True)
class Run:
    """A process that ended.

    Args:
        cost: `peak_rss` is that of the largest process among it and those that it started and waited for. What it
            read and wrote is not known.
        failure: its exit and the last line of its stderr; None where it succeeded.
        output: its stdout.
    """

    cost: Cost
    failure: str | None
    output: str


def run(command: Sequence[object], *, cwd: Path = ROOT, settings: Mapping[str, str] | None = None) -> Run:
    """Run `command` to its end.

    Args:
        cwd: where it is started.
        settings: environment variables besides those of this process.
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
    """`exit 1: MemoryError`, or `killed by SIGKILL: …`."""
    lines = [line.strip(_FRAME) for line in stderr.splitlines() if re.search(r"\w", line)]
    how = f"exit {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    return how + (f": {_FOLDERS.sub('…/', lines[-1])}" if lines else "")


def typical(costs: Iterable[Cost]) -> Cost:
    """The median of each figure, and the highest peak."""
    each = list(costs)
    return Cost(
        wall_s=statistics.median(one.wall_s for one in each),
        cpu_s=statistics.median(one.cpu_s for one in each),
        peak_rss=max((one.peak_rss for one in each if one.peak_rss is not None), default=None),
        read=_median(one.read for one in each),
        written=_median(one.written for one in each),
    )


def total(costs: Iterable[Cost]) -> Cost:
    """All of them one after the other: sums, and the highest peak."""
    each = list(costs)
    return Cost(
        wall_s=sum(one.wall_s for one in each),
        cpu_s=sum(one.cpu_s for one in each),
        peak_rss=max((one.peak_rss for one in each if one.peak_rss is not None), default=None),
        read=sum(one.read or 0 for one in each),
        written=sum(one.written or 0 for one in each),
    )


def _median(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return int(statistics.median(known)) if known else None


def _go_first() -> None:
    """Where memory runs out it is the measured process that the kernel ends, not someone else's."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
