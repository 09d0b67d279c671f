"""The peak of this process' resident memory over a stretch of work, in bytes.

Linux counts it a stretch (`reset_peak` starts one); elsewhere the figure is the peak since the process began.
"""

from __future__ import annotations

import sys
from pathlib import Path

_PROC = Path("/proc/self")


def reset_peak() -> None:
    """Start a new stretch, where the system can (writing 5 to `clear_refs`, proc(5))."""
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return


def peak_rss() -> int | None:
    """Bytes, or None where the system does not tell.

    `VmHWM` goes before `ru_maxrss`: the latter starts from the peak of whatever process started this one.
    """
    try:
        for line in (_PROC / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return _maxrss(children=False)


def peak_of_children() -> int | None:
    """Bytes: the largest peak of a process that this one started and waited for, ever; None where nobody tells."""
    return _maxrss(children=True)


def _maxrss(*, children: bool) -> int | None:
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
