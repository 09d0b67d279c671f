"""Limits of a machine, read from imitations of /proc and /sys/fs/cgroup."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from builder.util.machine import free_disk, memory_limit, nearest_existing, same_disk

GB = 10**9
PHYSICAL = psutil.virtual_memory().total
V1_NONE = 2**63 - 4096


def limit(folder: Path, groups: str | None, files: Mapping[str, object]) -> int:
    """Return `memory_limit` with `groups` as /proc/self/cgroup and `files` in the tree of control groups."""
    proc, cgroup = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    cgroup.mkdir()
    if groups is not None:
        (proc / "self" / "cgroup").write_text(groups)
    for name, content in files.items():
        file = cgroup / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    return memory_limit(proc, cgroup)


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        # version 2: own group, parent group, both, top group (as seen in a container)
        ("0::/a/b\n", {"a/b/memory.max": GB}, GB),
        ("0::/a/b\n", {"a/memory.max": GB, "a/b/memory.max": "max"}, GB),
        ("0::/a/b\n", {"a/memory.max": GB, "a/b/memory.max": 2 * GB}, GB),
        ("0::/a/b\n", {"a/memory.max": 2 * GB, "a/b/memory.max": GB}, GB),
        ("0::/\n", {"memory.max": GB}, GB),
        ("0::/a\n", {"other/memory.max": GB}, PHYSICAL),
        ("0::/a\n", {"a/memory.max": "max"}, PHYSICAL),
        ("0::/a\n", {"a/memory.max": 2**62}, PHYSICAL),
        # a group outside the container's view
        ("0::/../../host\n", {"memory.max": GB, "host/memory.max": GB // 2}, GB),
        # version 1
        ("4:memory:/a/b\n", {"memory/a/b/memory.limit_in_bytes": GB}, GB),
        ("4:cpu,memory:/a/b\n", {"memory/a/memory.limit_in_bytes": GB}, GB),
        ("4:cpu:/a\n", {"memory/a/memory.limit_in_bytes": GB}, PHYSICAL),
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": V1_NONE}, PHYSICAL),
        # the path is the host's, the tree the container's
        ("4:memory:/docker/c0ffee\n", {"memory/memory.limit_in_bytes": GB}, GB),
        # both versions at once
        (
            "4:memory:/a\n1:name=systemd:/x\n0::/b\n",
            {"memory/a/memory.limit_in_bytes": 2 * GB, "b/memory.max": GB},
            GB,
        ),
        ("not what the kernel writes\n", {"memory.max": GB}, PHYSICAL),
        (None, {"memory.max": GB}, PHYSICAL),
    ],
)
def test_the_least_limit_counts(tmp_path: Path, groups: str | None, files: Mapping[str, object], expected: int) -> None:
    assert limit(tmp_path, groups, files) == expected


def test_physical_memory_is_a_limit_too(tmp_path: Path) -> None:
    assert limit(tmp_path, "0::/a\n", {"a/memory.max": 4 * PHYSICAL}) == PHYSICAL


def test_this_machine_has_a_limit() -> None:
    assert 0 < memory_limit() <= PHYSICAL


def test_free_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    missing = tmp_path / "a" / "b"
    system = os.statvfs(tmp_path)
    assert free_disk(missing) == pytest.approx(system.f_bavail * system.f_frsize, rel=0.05)
    assert nearest_existing(missing) == tmp_path.resolve()
    assert same_disk(missing, tmp_path)
    assert not missing.parent.exists()


def test_a_link_counts_as_its_target(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away", target_is_directory=True)
    assert nearest_existing(tmp_path / "link" / "deeper") == (tmp_path / "far").resolve()


def test_two_file_systems_are_two_disks(tmp_path: Path) -> None:
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc")
    assert not same_disk(tmp_path, Path("/proc"))
