"""Memory and disk space that this process may use. A limit that cannot be read counts as no limit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
# More than any machine has means no limit: cgroups version 1 reports 2^63 less a page.
UNLIMITED = 2**60


def memory_limit(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Return the bytes that this process may use: the least of physical memory and the limits of its control groups.

    Args:
        proc: where proc(5) is mounted.
        cgroup: where cgroups(7), version 1, 2 or both, are mounted.
    """
    limits = [limit for file in _limit_files(proc, cgroup) if (limit := _read(file)) is not None]
    return min([int(psutil.virtual_memory().total), *limits])


def free_disk(path: Path) -> int:
    """Return the bytes that may be written under `path`, which need not exist yet."""
    return shutil.disk_usage(nearest_existing(path)).free


def same_disk(first: Path, second: Path) -> bool:
    """Return whether two paths, which need not exist yet, are on the same file system."""
    return nearest_existing(first).stat().st_dev == nearest_existing(second).stat().st_dev


def nearest_existing(path: Path) -> Path:
    """Return the nearest of `path` and its parents that exists."""
    path = path.resolve()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _limit_files(proc: Path, cgroup: Path) -> Iterator[Path]:
    """Yield the limit file of this process's control group and of every group above it."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for number, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if number == "0" and not controllers:
            top, name = cgroup, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = cgroup / "memory", "memory.limit_in_bytes"
        else:
            continue
        parts = PurePosixPath(path).parts[1:]
        # ".." is a group outside the container's view. A path of the host does not exist here, but its top does.
        own = top if ".." in parts else top.joinpath(*parts)
        yield own / name
        while own != top:
            own = own.parent
            yield own / name


def _read(file: Path) -> int | None:
    try:
        limit = int(file.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None
    return limit if limit < UNLIMITED else None
