"""A shard hashes the bytes it reads, and a file that changes while it is read is an error."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from builder.checkpoint import shard_reader
from builder.checkpoint.load import open_checkpoint
from builder.checkpoint.shard_reader import open_shard
from builder.graph.binding import Binding
from builder.graph.external_data import write_data
from builder.util.errors import CheckpointError
from tests.helpers.edits import rewritten

CONTENT = bytes(np.random.default_rng(0).integers(0, 256, 1000, np.uint8))
LONG_AGO = 10**18  # a change now has another time, however coarse the file system's clock


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT)
    os.utime(path, ns=(LONG_AGO, LONG_AGO))
    return path


def four_parts(error: CheckpointError, path: Path) -> None:
    """Check that an error names the file, and has expected, found and next."""
    assert str(path) in error.what
    assert all(error.as_dict()[part] for part in ("what", "expected", "found", "next"))


def test_reads_return_the_bytes_of_the_file(file: Path) -> None:
    with open_shard(file) as opened:
        for start, stop in ((0, 10), (990, 1000), (10, 10), (3, 700), (1000, 1000)):
            got = opened.read(start, stop)
            assert got.dtype == np.uint8
            assert got.tobytes() == CONTENT[start:stop]


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    "ranges",
    [
        pytest.param([(0, 1000)], id="all at once"),
        pytest.param([(0, 300), (300, 999), (999, 1000)], id="in order"),
        pytest.param([(200, 300), (600, 1000)], id="with gaps"),
        pytest.param([(100, 300), (100, 200), (200, 300), (300, 500)], id="some of it again"),
        pytest.param([(100, 300), (200, 400), (250, 500)], id="overlapping"),
        pytest.param([(900, 1000), (0, 100)], id="backwards"),
        pytest.param([(5, 5)], id="no byte"),
        pytest.param([], id="nothing"),
    ],
)
def test_the_digest_is_the_files_whatever_was_read(
    file: Path, ranges: list[tuple[int, int]], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_reader, "STEP", step)
    with open_shard(file) as opened:
        for start, stop in ranges:
            assert opened.read(start, stop).tobytes() == CONTENT[start:stop]
        assert opened.sha256() == opened.sha256() == hashlib.sha256(CONTENT).hexdigest()


def test_an_empty_file_has_a_digest(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with open_shard(tmp_path / "empty") as opened:
        assert opened.sha256() == hashlib.sha256(b"").hexdigest()


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def grown(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"more")


def replaced(path: Path) -> None:
    """Rename another file of the same bytes, size and time into place."""
    other = path.with_name("other")
    shutil.copy2(path, other)
    assert (other.stat().st_size, other.stat().st_mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)
    os.replace(other, path)


FAULTS = [
    pytest.param(truncated, "was cut short while it was read", id="truncated"),
    pytest.param(rewritten, "changed while it was read", id="rewritten"),
    pytest.param(grown, "changed while it was read", id="grown"),
    pytest.param(replaced, "changed while it was read", id="replaced"),
    pytest.param(os.unlink, "was removed while it was read", id="gone"),
]


def read_across(path: Path, event: Callable[[Path], None], stop: int = 1000) -> None:
    """Read 400 bytes, apply the event to the file, then read the bytes up to `stop`."""
    with open_shard(path) as opened:
        opened.read(0, 400)
        event(path)
        opened.read(400, stop)


@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_a_file_that_changes_between_two_reads(file: Path, fault: Callable[[Path], None], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_across(file, fault)
    four_parts(caught.value, file)


def test_the_error_for_a_truncated_file_gives_its_length(file: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_across(file, truncated, stop=900)
    assert (caught.value.expected, caught.value.found) == ("at least 900 bytes", "500 bytes")


def test_a_file_that_is_truncated_after_the_last_read(file: Path) -> None:
    with pytest.raises(CheckpointError, match="changed while it was read"):
        read_across(file, truncated, stop=500)


def test_an_error_inside_is_not_replaced(file: Path) -> None:
    def fail(path: Path) -> None:
        path.unlink()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        read_across(file, fail)


@pytest.mark.parametrize("kind", ["gone", "folder"])
def test_a_file_that_cannot_be_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    if kind == "folder":
        path.mkdir()
    with pytest.raises(CheckpointError, match="cannot be read") as caught, open_shard(path):
        pass
    four_parts(caught.value, path)


@pytest.mark.parametrize("transposed", [False, True], ids=["as stored", "transposed"])
@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_a_shard_that_changes_while_the_weights_are_written(
    sharded: Path,
    tmp_path: Path,
    fault: Callable[[Path], None],
    message: str,
    transposed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second of three files changes after its first tensor; no data file is left under its final name."""
    monkeypatch.setattr(shard_reader, "BLOCK", 1000)
    opened = open_checkpoint(sharded)
    second = sorted(sharded.glob("*.safetensors"))[1]
    os.utime(second, ns=(LONG_AGO, LONG_AGO))
    small = [tensor for tensor in opened.tensors.values() if tensor.nbytes < 50_000]
    bindings = [
        Binding(tensor.name, tensor.name, "float32", tensor.shape, transposed and len(tensor.shape) == 2)
        for tensor in small
    ]
    first = sum(tensor.file < second.name for tensor in opened.tensors.values())
    counted: list[int] = []

    def on_read(count: int) -> None:
        counted.append(count)
        if len(counted) == first + 1:
            fault(second)

    with pytest.raises(CheckpointError, match=message) as caught:
        write_data({tmp_path / "one": bindings, tmp_path / "two": bindings[:1]}, opened, on_read)
    four_parts(caught.value, second)
    assert len(counted) < len(opened.tensors)
    assert not [file for file in tmp_path.iterdir() if file.name in ("one", "two")]
