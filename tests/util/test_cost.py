"""A meter measures this process and the children it waits for, from its construction on."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import pytest

from builder.util import peak_memory
from builder.util.cost import Cost, Meter
from tests.helpers.processes import python

MEGABYTE = 10**6
LARGE = 80 * MEGABYTE

# A process prints its peaks around a child that holds `SIZE` bytes.
PARENT = """
import subprocess, sys
from builder.util.cost import Meter
meter = Meter()
print(meter.cost().peak_rss)
subprocess.run([sys.executable, "-c", "bytearray(b'1') * SIZE"], check=True)
print(meter.cost().peak_rss)
print(Meter().cost().peak_rss)
"""


def hold(size: int) -> None:
    """Touch every page of a block of memory, then free it."""
    np.ones(size, np.uint8)


def elsewhere(code: str) -> None:
    """Run code in a child process and wait for it."""
    subprocess.run([sys.executable, "-c", code], check=True)


def cost_of(work: Callable[[], object]) -> Cost:
    meter = Meter()
    work()
    return meter.cost()


def test_the_peak_is_that_since_the_meter_began() -> None:
    """Memory that was held before and freed does not count."""
    small = cost_of(lambda: None).peak_rss
    large = cost_of(lambda: hold(LARGE)).peak_rss
    after = cost_of(lambda: None).peak_rss
    assert small
    assert large
    assert after
    assert small + 0.9 * LARGE < large < small + 1.5 * LARGE
    assert after < small + 0.5 * LARGE


def test_the_peak_of_a_child_process_counts(tmp_path: Path) -> None:
    done = python("-c", PARENT.replace("SIZE", str(4 * LARGE)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, with_it, afterwards = map(int, done.stdout.split())
    assert before < 2 * LARGE
    assert 4 * LARGE < with_it < 6 * LARGE
    assert afterwards < 2 * LARGE


def test_bytes_through_system_calls(tmp_path: Path) -> None:
    size = 5 * MEGABYTE
    wrote = cost_of(lambda: (tmp_path / "file").write_bytes(bytes(size)))
    read = cost_of(lambda: (tmp_path / "file").read_bytes())
    assert wrote.written is not None
    assert size <= wrote.written < size + MEGABYTE
    assert read.read is not None
    assert size <= read.read < size + MEGABYTE
    assert read.written is not None
    assert read.written < MEGABYTE


def test_bytes_of_a_child_process_count(tmp_path: Path) -> None:
    size = 50 * MEGABYTE  # more than an interpreter reads to start
    code = f"open({str(tmp_path / 'file')!r}, 'wb').write(bytes({size}))"
    cost = cost_of(lambda: elsewhere(code))
    assert cost.written is not None
    assert size <= cost.written < size + MEGABYTE


def test_wall_clock_and_cpu_seconds() -> None:
    def busy() -> None:
        until = time.process_time() + 0.1
        while time.process_time() < until:
            pass

    worked, slept = cost_of(busy), cost_of(lambda: time.sleep(0.1))
    assert worked.cpu_s >= 0.05
    assert slept.wall_s >= 0.1
    assert slept.cpu_s < 0.05
    other = cost_of(lambda: elsewhere("import time\nwhile time.process_time() < 0.2: pass"))
    assert other.cpu_s >= 0.15


@pytest.mark.parametrize("error", [psutil.AccessDenied(), PermissionError(13, "Permission denied")], ids=repr)
def test_hidden_counters_are_none(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(self: psutil.Process) -> None:
        raise error

    monkeypatch.setattr(psutil.Process, "io_counters", hidden)
    cost = cost_of(lambda: None)
    assert (cost.read, cost.written) == (None, None)
    assert cost.wall_s >= 0


def test_a_system_without_byte_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(psutil.Process, "io_counters")
    cost = cost_of(lambda: None)
    assert (cost.read, cost.written) == (None, None)


def test_a_system_without_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_memory, "peak_rss", lambda: None)
    assert cost_of(lambda: None).peak_rss is None


def test_fields_are_those_of_a_record() -> None:
    assert list(asdict(cost_of(lambda: None))) == ["wall_s", "cpu_s", "peak_rss", "read", "written"]
