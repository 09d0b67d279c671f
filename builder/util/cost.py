"""Measure the cost of a piece of work: seconds, peak memory, bytes read and written.

Child processes that the work waits for are included. Memory is the resident bytes of the largest single process; reads
and writes are those of system calls, whether served from the page cache or not.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil

from builder.util import peak_memory


@dataclass(frozen=True)
class Cost:
    """Wall-clock and CPU seconds; bytes, or None where the system does not report them."""

    wall_s: float
    cpu_s: float
    peak_rss: int | None
    read: int | None
    written: int | None


class Meter:
    """Measures from its construction on."""

    def __init__(self) -> None:
        peak_memory.reset_peak()
        self._process = psutil.Process()
        self._children = peak_memory.peak_of_children()
        self._begin, self._cpu, self._io = time.perf_counter(), self._cpu_s(), self._moved()

    def cost(self) -> Cost:
        """Return the cost since the meter was constructed."""
        peaks = [peak_memory.peak_rss()]
        if (peak := peak_memory.peak_of_children()) != self._children:
            peaks.append(peak)
        moved = zip(self._moved(), self._io, strict=True)
        read, written = (None if now is None or then is None else now - then for now, then in moved)
        return Cost(
            wall_s=round(time.perf_counter() - self._begin, 3),
            cpu_s=round(self._cpu_s() - self._cpu, 3),
            peak_rss=max((peak for peak in peaks if peak is not None), default=None),
            read=read,
            written=written,
        )

    def _cpu_s(self) -> float:
        return sum(self._process.cpu_times()[:4])

    def _moved(self) -> tuple[int | None, int | None]:
        try:
            counters = self._process.io_counters() if hasattr(self._process, "io_counters") else None
        except (psutil.Error, OSError):  # a container may hide /proc/PID/io
            counters = None
        return getattr(counters, "read_chars", None), getattr(counters, "write_chars", None)
