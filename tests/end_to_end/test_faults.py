"""`qwen3vl-onnx build` when the disk, another build or a signal gets in the way: a clear error or a clean resume.

Each fault is the system's own: a limit on the size of files, a disk of a few megabytes that fills up, one that is
mounted read-only, a file that is cut. Two of them need a mount in a namespace of the test's own, which a machine may
forbid: these tests are then skipped, with its reason. In the end there are always the bytes of an undisturbed build.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from builder.util.errors import CheckpointError, OutputError
from tests.helpers.checkpoints import MINIATURE
from tests.helpers.processes import ROOT, artifacts, copied, python

pytestmark = pytest.mark.torch  # what is built upon is traced

MEGABYTE = 10**6
SHARD = "model.safetensors"
# Files may become no larger than this many bytes: half of what the decoder's weights take.
LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
"""
# The system sends a signal with the first byte too many, in the middle of a data file.
KILLED = """
import os, signal
signal.signal(signal.SIGXFSZ, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
"""
# What happens when the decoder's data file is opened, before a byte of a weight is read or written.
MEANWHILE = """
import os, sys, time

begun = []

def hook(event, arguments):
    if event == "open" and not begun and str(arguments[0]).endswith("/model.onnx.data.part"):
        begun.append(True)
        meanwhile()

sys.addaudithook(hook)
"""
FILLED = """
def meanwhile():
    room = os.statvfs("{disk}")
    with open("{disk}/filler", "wb") as file:
        file.write(bytes(room.f_bavail * room.f_frsize - {left}))
"""
CUT = """
def meanwhile():
    os.truncate("{file}", os.stat("{file}").st_size // 2)
"""
WAITING = """
def meanwhile():
    open("{folder}/begun", "w").close()
    while not os.path.exists("{folder}/go"):
        time.sleep(0.01)
"""

Shim = Callable[[str], dict[str, str]]


@dataclass(frozen=True)
class Disk:
    """A small disk for the test.

    Args:
        mount: where it is, for those who are in its namespace.
        inside: a command that runs the command behind it there.
        seen: the same folder, for this process.
    """

    mount: Path
    inside: tuple[str, ...]
    seen: Path

    def remount(self, how: str) -> None:
        subprocess.run([*self.inside, "mount", "-o", f"remount,{how}", self.mount], check=True)

    @property
    def used(self) -> int:
        """Bytes."""
        return shutil.disk_usage(self.seen).used


@pytest.fixture
def unwritten(miniature_built: Path, tmp_path: Path) -> Path:
    """An output folder with complete graphs and without weights."""
    output = copied(miniature_built.parent, tmp_path / "out")
    for folder in ("5-quantize", "6-configure"):
        shutil.rmtree(output / folder)
    return output


@pytest.fixture
def half(miniature_built: Path) -> int:
    """Bytes of half of the decoder's weights."""
    return (miniature_built / "genai" / "model.onnx.data").stat().st_size // 2


@pytest.fixture
def shim(tmp_path: Path) -> Shim:
    """`shim(code)`: settings of a Python that runs `code` when it starts."""

    def settings(code: str) -> dict[str, str]:
        folder = tmp_path / "shim"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(code)
        return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}

    return settings


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """40 MB, removed with the process that owns its namespace."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if shutil.which("unshare") is None:
        pytest.skip("this machine has no `unshare`, which makes a namespace to mount a disk in")
    holder = subprocess.Popen(
        ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs -o size=40m none '{mount}' && echo mounted && read wait"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        if (reply := holder.stdout.readline().strip()) != "mounted":
            pytest.skip(f"no mount in a namespace of its own on this machine: {reply}")
        inside = ("nsenter", "-t", str(holder.pid), "-U", "-m", "--preserve-credentials")
        yield Disk(mount, inside, Path(f"/proc/{holder.pid}/root") / mount.relative_to("/"))


def build(
    output: Path,
    settings: dict[str, str] | None = None,
    inside: tuple[str, ...] = (),
    checkpoint: Path = MINIATURE,
) -> subprocess.CompletedProcess[str]:
    """`build --until configure --json`, optionally `inside` a namespace."""
    arguments = ("-m", "builder", "build", checkpoint, "--until", "configure", "--json", "--output", output)
    executable, *rest = (*inside, sys.executable)
    return python(*rest, *arguments, executable=executable, cwd=Path("/"), settings=settings)


def refused(done: subprocess.CompletedProcess[str], kind: type[OutputError | CheckpointError]) -> dict[str, Any]:
    """The error's report: on stderr in words, on stdout as JSON, and its exit code."""
    assert done.returncode == kind.exit_code, done.stdout + done.stderr
    reported: dict[str, Any] = json.loads(done.stdout)
    assert (reported["error"], reported["ok"]) == (kind.__name__, False)
    assert reported["next"]
    assert f"error: {reported['what']}" in done.stderr
    assert "Traceback" not in done.stderr
    return reported


def states(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Stage → state, of a successful build."""
    assert done.returncode == 0, done.stdout + done.stderr
    return {stage["stage"]: stage["state"] for stage in json.loads(done.stdout)["stages"]}


def resumed(done: subprocess.CompletedProcess[str]) -> None:
    """It resumed after the last complete stage."""
    complete = dict.fromkeys(("fetch", "patch", "export", "optimize"), "cached")
    assert states(done) == {**complete, "quantize": "run", "configure": "run"}


def test_a_file_that_may_not_grow_further(unwritten: Path, half: int, shim: Shim, miniature_built: Path) -> None:
    before = artifacts(unwritten)
    reported = refused(build(unwritten, shim(LIMITED.format(limit=half))), OutputError)
    assert (reported["what"], reported["found"]) == (
        f"the output folder {unwritten} cannot be written",
        "File too large",
    )
    assert artifacts(unwritten) == before  # nothing of the stage, under any name
    assert not list(unwritten.glob("5-quantize*"))
    resumed(build(unwritten))
    assert artifacts(unwritten) == artifacts(miniature_built.parent)


def test_a_disk_that_fills_up_meanwhile(unwritten: Path, disk: Disk, shim: Shim, miniature_built: Path) -> None:
    """The disk had space when the build began. The space is freed, and with more of it the build resumes."""
    copied(unwritten, disk.seen / "out")
    output, used = disk.seen / "out", disk.used
    filled = MEANWHILE + FILLED.format(disk=disk.mount, left=4 * MEGABYTE)
    reported = refused(build(disk.mount / "out", shim(filled), disk.inside), OutputError)
    assert reported["found"] == "No space left on device"
    assert "free some space" in reported["next"]
    assert not list(output.glob("5-quantize*"))
    (disk.seen / "filler").unlink()
    assert disk.used < used + MEGABYTE
    resumed(build(disk.mount / "out", inside=disk.inside))
    assert artifacts(output) == artifacts(miniature_built.parent)


@pytest.mark.parametrize("place", ["out", "fresh"])
def test_a_disk_that_is_read_only(unwritten: Path, disk: Disk, miniature_built: Path, place: str) -> None:
    copied(unwritten, disk.seen / "out")
    before = artifacts(disk.seen)
    disk.remount("ro")
    reported = refused(build(disk.mount / place, inside=disk.inside), OutputError)
    assert reported["what"] == f"the output folder {disk.mount / place} cannot be written"
    assert reported["found"] == "Read-only file system"
    assert artifacts(disk.seen) == before
    disk.remount("rw")
    if place == "out":
        resumed(build(disk.mount / "out", inside=disk.inside))
        assert artifacts(disk.seen / "out") == artifacts(miniature_built.parent)


def test_a_second_build_into_the_same_folder(
    unwritten: Path, shim: Shim, tmp_path: Path, miniature_built: Path
) -> None:
    """It reports so and leaves the first build, which is writing weights, alone."""
    waiting = shim(MEANWHILE + WAITING.format(folder=tmp_path))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(build, unwritten, waiting)
        try:
            while not (tmp_path / "begun").exists():
                assert not first.done(), first.result().stderr
                time.sleep(0.01)
            there = sorted(unwritten.rglob("*"))
            reported = refused(build(unwritten), OutputError)
            assert sorted(unwritten.rglob("*")) == there
        finally:
            (tmp_path / "go").touch()
        resumed(first.result())
    assert reported["what"] == f"another build is writing to {unwritten}"
    assert "wait until it ends" in reported["next"]
    assert artifacts(unwritten) == artifacts(miniature_built.parent)


def test_a_kill_in_the_middle_of_a_data_file(unwritten: Path, half: int, shim: Shim, miniature_built: Path) -> None:
    """SIGKILL at the byte after `half`: no cleanup, and no folder that looks complete."""
    done = build(unwritten, shim(LIMITED.format(limit=half) + KILLED))
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    part = unwritten / "5-quantize.part" / "genai"
    assert (part / "model.onnx.data.part").stat().st_size == half
    assert not list(part.glob("*.data"))
    assert not (unwritten / "5-quantize").exists()
    resumed(build(unwritten))
    assert not list(unwritten.glob("*.part"))
    assert artifacts(unwritten) == artifacts(miniature_built.parent)


def test_a_shard_that_is_cut_while_it_is_read(
    unwritten: Path, shim: Shim, tmp_path: Path, miniature_built: Path
) -> None:
    checkpoint = Path(shutil.copytree(MINIATURE, tmp_path / "moved" / MINIATURE.name))
    before = (checkpoint / SHARD).stat()
    cut = MEANWHILE + CUT.format(file=checkpoint / SHARD)
    reported = refused(build(unwritten, shim(cut), checkpoint=checkpoint), CheckpointError)
    assert reported["what"] == f"{checkpoint / SHARD} was cut short while it was read"
    assert reported["expected"]
    assert reported["found"] == f"{before.st_size // 2} bytes"
    assert not (unwritten / "5-quantize").exists()
    assert not list(unwritten.rglob("*.data"))
    shutil.copyfile(MINIATURE / SHARD, checkpoint / SHARD)
    os.utime(checkpoint / SHARD, ns=(before.st_atime_ns, before.st_mtime_ns))
    resumed(build(unwritten, checkpoint=checkpoint))
    assert artifacts(unwritten) == artifacts(miniature_built.parent)
