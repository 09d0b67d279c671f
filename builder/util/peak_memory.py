"""Peak resident memory of this process, in bytes.

On Linux the peak is that since `reset_peak`; elsewhere it is that since the process started.
"""

from __future__ import annotations

import sys
from pathlib import Path

_PROC = Path("/proc/self")


def reset_peak() -> None:
    """Reset the peak where the system supports it (5 written to `clear_refs`, proc(5))."""
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return


def peak_rss() -> int | None:
    """Return the peak in bytes, or None where the system does not report it.

    `VmHWM` is preferred to `ru_maxrss`, which starts from the peak of the parent process.
    """
    try:
        for line in (_PROC / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return _maxrss(children=False)


def peak_of_children() -> int | None:
    """Return the largest peak of any child process waited for so far, or None where the system does not report it."""
    return _maxrss(children=True)


def _maxrss(*, children: bool) -> int | None:
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
