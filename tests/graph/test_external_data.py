"""write_data: streaming block by block gives the same bytes as converting each array at once."""

from __future__ import annotations

import hashlib
import os
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import NoReturn

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from builder.checkpoint import shard_reader
from builder.checkpoint.load import Checkpoint, open_checkpoint
from builder.checkpoint.safetensors import index_tensors
from builder.checkpoint.shard_reader import Bytes, Shard
from builder.graph import external_data
from builder.graph.binding import Binding
from builder.graph.external_data import ALIGNMENT, DataFile, layout, padded, write_data
from builder.util.errors import WeightError
from builder.util.files import atomic_write
from tests.helpers.small_graphs import Array, drawn

FILE = "model.safetensors"
TENSORS = {
    "f32": drawn(7, 5),
    "f16": drawn(7, 5, seed=1).astype(np.float16),
    "bf16": drawn(7, 5, seed=2).astype(ml_dtypes.bfloat16),
    "vector": drawn(9),
    "conv": drawn(6, 3, 2, 4, 4).astype(ml_dtypes.bfloat16),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
}
# Initializers, not in the order of the file.
BINDINGS = (
    Binding("z.plain", "f32", "float32", (7, 5)),
    Binding("y.transposed", "f32", "float32", (7, 5), transposed=True),
    Binding("x.half", "f16", "float32", (7, 5)),
    Binding("w.half_transposed", "f16", "float32", (7, 5), transposed=True),
    Binding("v.brain", "bf16", "float32", (7, 5)),
    Binding("u.brain_transposed", "bf16", "float32", (7, 5), transposed=True),
    Binding("t.vector", "vector", "float32", (9,)),
    Binding("s.conv", "conv", "float32", (6, 3, 2, 4, 4)),
    Binding("r.flat", "conv", "float32", (6, 96)),
    Binding("q.flat_transposed", "conv", "float32", (6, 96), transposed=True),
    Binding("p.scalar", "scalar", "float32", ()),
    Binding("o.kept_half", "f16", "float16", (7, 5), transposed=True),
    Binding("n.kept_brain", "bf16", "bfloat16", (7, 5), transposed=True),
    Binding("m.empty", "empty", "float32", (0, 4)),
)


@pytest.fixture
def source(tmp_path: Path, miniature: Path) -> Checkpoint:
    """A checkpoint of `TENSORS`."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file(dict(TENSORS), folder / FILE)
    return replace(open_checkpoint(miniature), folder=folder, tensors=index_tensors(folder, [FILE]))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`small(BLOCK=19, TILE=3)`: bytes, rows and blocks at a time, so that every boundary is crossed."""

    def make(**sizes: int) -> None:
        for name, size in sizes.items():
            for module in (external_data, shard_reader):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, size)

    return make


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """File, start and stop of every read from a checkpoint."""
    seen: list[tuple[str, int, int]] = []
    read = Shard.read

    def noted(shard: Shard, start: int, stop: int) -> Bytes:
        content = read(shard, start, stop)
        seen.append((shard.path.name, start, stop))
        return content

    monkeypatch.setattr(Shard, "read", noted)
    return seen


def whole(binding: Binding) -> Array:
    """The complete initializer."""
    array = TENSORS[binding.tensor].reshape(binding.shape)
    return np.ascontiguousarray((array.T if binding.transposed else array).astype(binding.dtype))


def written(bindings: Sequence[Binding], source: Checkpoint, path: Path) -> DataFile:
    """The file of a pass that writes a single file."""
    return write_data({path: bindings}, source).files[path]


def placed(data: DataFile, path: Path, binding: Binding) -> bytes:
    """The bytes of an initializer."""
    offset, length = data.placements[binding.content]
    return path.read_bytes()[offset : offset + length]


@pytest.mark.parametrize("tile", [1, 3, 64])
@pytest.mark.parametrize("strip", [1, 75, 1 << 20])
@pytest.mark.parametrize("block", [1, 19, 100, 1 << 20])
def test_every_block_size_gives_the_bytes_of_the_complete_array(
    source: Checkpoint, tmp_path: Path, small: Callable[..., None], block: int, strip: int, tile: int
) -> None:
    small(BLOCK=block, STRIP=strip, TILE=tile)
    data = written(BINDINGS, source, tmp_path / "data")
    assert set(data.placements) == {binding.content for binding in BINDINGS}
    for binding in BINDINGS:
        assert data.placements[binding.content][1] == whole(binding).nbytes
        assert placed(data, tmp_path / "data", binding) == whole(binding).tobytes(), binding.initializer


@pytest.mark.parametrize("shape", ["biased", "deepstack0", "untied"])
def test_every_tensor_of_a_checkpoint(
    checkpoint: Callable[[str], Path], shape: str, tmp_path: Path, small: Callable[..., None]
) -> None:
    """bf16 in three shards, f16 in one file, f32 in two: Conv3d, matrices and vectors, as a model has them."""
    small(BLOCK=1000, STRIP=5000, TILE=7)
    opened = open_checkpoint(checkpoint(shape))
    # Matrices with a vocabulary axis would be read once for each of its thousands of columns.
    matrices = [name for name, tensor in opened.tensors.items() if len(tensor.shape) == 2 and tensor.nbytes < 50_000]
    bindings = [Binding(name, name, "float32", tensor.shape) for name, tensor in opened.tensors.items()]
    bindings += [
        Binding(f"{name}.transposed", name, "float32", opened.tensors[name].shape, transposed=True)
        for name in matrices[:5]
    ]
    data = written(bindings, opened, tmp_path / "data")
    content = np.fromfile(tmp_path / "data", np.uint8)
    for binding in bindings:
        (offset, length), want = data.placements[binding.content], opened.read(binding.tensor)
        got = content[offset : offset + length].view(np.float32).reshape(binding.stored_shape)
        np.testing.assert_array_equal(got, (want.T if binding.transposed else want).astype(np.float32))


@pytest.mark.parametrize("shape", ["biased", "deepstack0", "untied"])
def test_contents_are_in_the_checkpoints_order(
    checkpoint: Callable[[str], Path], shape: str, tmp_path: Path, reads: list[tuple[str, int, int]]
) -> None:
    """File by file, and front to back in each, so that reading and writing take a single pass."""
    opened = open_checkpoint(checkpoint(shape))
    bindings = [Binding(name, name, "float32", tensor.shape) for name, tensor in sorted(opened.tensors.items())]
    data = written(bindings, opened, tmp_path / "data")
    in_the_file = sorted(data.placements, key=lambda content: data.placements[content][0])
    want = sorted(opened.tensors.values(), key=lambda tensor: (tensor.file, tensor.offset))
    assert [content.tensor for content in in_the_file] == [tensor.name for tensor in want]
    assert reads == sorted(reads)


def test_each_content_is_on_pages_of_its_own(source: Checkpoint, tmp_path: Path) -> None:
    data = written(BINDINGS, source, tmp_path / "data")
    spans = sorted((offset, offset + length) for offset, length in data.placements.values() if length)
    content = (tmp_path / "data").read_bytes()
    assert all(offset % ALIGNMENT == 0 for offset, _ in spans)
    assert [padded(end) for _, end in spans] == [*(begin for begin, _ in spans[1:]), len(content)]
    assert data.size == len(content)
    gaps = [*((end, begin) for (_, end), (begin, _) in pairwise(spans)), (spans[-1][1], len(content))]
    assert not any(any(content[end:begin]) for end, begin in gaps)
    assert sum(begin - end for end, begin in gaps) > ALIGNMENT


def test_a_content_that_fills_its_pages_is_not_padded(source: Checkpoint) -> None:
    sizes = {"a": ALIGNMENT // 4, "b": ALIGNMENT // 4 + 1, "c": ALIGNMENT // 4}
    tensors = {
        name: replace(source.tensors["f32"], name=name, shape=(size,), offset=place)
        for place, (name, size) in enumerate(sizes.items())
    }
    exact = [Binding(name, name, "float32", (size,)) for name, size in sizes.items()]
    found = layout(exact, replace(source, tensors=tensors))
    assert [found[binding][0] for binding in (binding.content for binding in exact)] == [0, ALIGNMENT, 3 * ALIGNMENT]


def test_the_layout_depends_neither_on_names_nor_on_the_order_of_bindings(source: Checkpoint) -> None:
    renamed = [replace(binding, initializer=f"other.{number}") for number, binding in enumerate(reversed(BINDINGS))]
    assert list(layout(renamed, source).items()) == list(layout(BINDINGS, source).items())


def test_a_content_of_two_names_is_written_once(source: Checkpoint, tmp_path: Path) -> None:
    again = replace(BINDINGS[0], initializer="again")
    data = written([BINDINGS[0], again], source, tmp_path / "data")
    assert list(data.placements.values()) == [(0, 7 * 5 * 4)]
    assert data.size == ALIGNMENT
    assert placed(data, tmp_path / "data", again) == whole(again).tobytes()


@pytest.mark.parametrize("queued", [1, 3])
@pytest.mark.parametrize("block", [7, shard_reader.BLOCK])
def test_the_digest_is_that_of_the_file_and_the_same_each_time(
    source: Checkpoint, tmp_path: Path, small: Callable[..., None], block: int, queued: int
) -> None:
    second = written(tuple(reversed(BINDINGS)), source, tmp_path / "two")
    small(BLOCK=block, QUEUED=queued)
    first = written(BINDINGS, source, tmp_path / "one")
    assert first == second == DataFile(first.placements, first.size, first.sha256)
    assert hashlib.sha256((tmp_path / "one").read_bytes()).hexdigest() == first.sha256
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("wanted", ["all of it", "one tensor", "nothing"])
def test_the_digests_of_what_is_read_are_those_of_the_files(
    checkpoint: Callable[[str], Path], tmp_path: Path, small: Callable[..., None], wanted: str
) -> None:
    """Headers, and tensors that are in no data file, are included."""
    small(BLOCK=1000, STRIP=5000)
    opened = open_checkpoint(checkpoint("biased"))
    names = {"all of it": list(opened.tensors), "one tensor": ["model.visual.pos_embed.weight"], "nothing": []}[wanted]
    bindings = [Binding(name, name, "float32", opened.tensors[name].shape) for name in names]
    bindings += [each.with_axes_swapped() for each in bindings if len(each.shape) == 2 and each.nbytes < 50_000]
    shards = write_data({tmp_path / "data": bindings}, opened).shards
    files = sorted(opened.folder.glob("*.safetensors"))
    assert len(files) == 3
    assert shards == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_without_transposition_a_file_is_read_once(
    checkpoint: Callable[[str], Path], tmp_path: Path, small: Callable[..., None], reads: list[tuple[str, int, int]]
) -> None:
    """Every byte of every file, for the digest too."""
    small(BLOCK=1000)
    opened = open_checkpoint(checkpoint("biased"))
    bindings = [Binding(name, name, "float32", tensor.shape) for name, tensor in opened.tensors.items()]
    written(bindings, opened, tmp_path / "data")
    assert len(reads) > 100
    for file in opened.folder.glob("*.safetensors"):
        spans = [(start, stop) for name, start, stop in reads if name == file.name and stop > start]
        assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
        assert spans[-1][1] == file.stat().st_size


@pytest.mark.parametrize(
    ("strip", "times"), [(7 * 5 * 4, 1), (7 * 5 * 4 - 1, 2), (7 * 2 * 4, 3), (1, 5)], ids=lambda value: str(value)
)
def test_a_transposed_tensor_is_read_once_for_each_strip(
    source: Checkpoint,
    tmp_path: Path,
    small: Callable[..., None],
    reads: list[tuple[str, int, int]],
    strip: int,
    times: int,
) -> None:
    small(BLOCK=40, STRIP=strip)  # two rows of five
    binding = Binding("y", "f32", "float32", (7, 5), transposed=True)
    data = written([binding], source, tmp_path / "data")
    assert placed(data, tmp_path / "data", binding) == whole(binding).tobytes()
    tensor = source.tensors["f32"]
    inside = [read for read in reads if tensor.offset <= read[1] and read[2] <= tensor.offset + tensor.nbytes]
    assert sum(stop - start for _, start, stop in inside) == times * tensor.nbytes


def test_several_files_in_one_pass(source: Checkpoint, tmp_path: Path, small: Callable[..., None]) -> None:
    """Each file equals that of a separate pass; a content may be in several files."""
    small(BLOCK=19, STRIP=75, TILE=3)
    parts = {tmp_path / "one": BINDINGS[::2], tmp_path / "two": BINDINGS[1::2], tmp_path / "three": BINDINGS[:5]}
    together = write_data(parts, source)
    assert set(together.files) == set(parts)
    for path, bindings in parts.items():
        assert together.files[path] == written(bindings, source, tmp_path / "alone")
        assert path.read_bytes() == (tmp_path / "alone").read_bytes()


def test_progress_counts_the_bytes_of_every_tensor_once(source: Checkpoint, tmp_path: Path) -> None:
    counted: list[int] = []
    write_data({tmp_path / "one": BINDINGS, tmp_path / "two": BINDINGS[:3]}, source, counted.append)
    assert sorted(counted) == sorted(array.nbytes for array in TENSORS.values())


def test_no_bindings_give_an_empty_file(source: Checkpoint, tmp_path: Path) -> None:
    data = written([], source, tmp_path / "data")
    assert (data.placements, data.size) == ({}, 0)
    assert (tmp_path / "data").read_bytes() == b""


def test_files_are_flushed_to_the_disk_before_any_has_its_name(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def noted(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def noting(*arguments: object) -> object:
            order.append(name)
            return call(*arguments)

        return noting

    monkeypatch.setattr(os, "fsync", noted("fsync", os.fsync))
    monkeypatch.setattr(os, "replace", noted("replace", os.replace))
    write_data({tmp_path / "one": BINDINGS, tmp_path / "two": BINDINGS[:3]}, source)
    assert order == ["fsync", "fsync", "replace", "replace"]


BROKEN = [
    pytest.param(Binding("u.middle", "gone", "float32", (3,)), id="no such tensor"),
    pytest.param(Binding("u.middle", "f32", "float32", (4, 4)), id="another size"),
    pytest.param(Binding("u.middle", "conv", "float32", (6, 3, 32), transposed=True), id="three axes transposed"),
]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_binding_that_does_not_fit_leaves_no_file(source: Checkpoint, tmp_path: Path, broken: Binding) -> None:
    with pytest.raises(WeightError, match=broken.tensor):
        write_data({tmp_path / "one": BINDINGS, tmp_path / "data": [*BINDINGS, broken]}, source)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]
    data = written(BINDINGS, source, tmp_path / "data")
    assert hashlib.sha256((tmp_path / "data").read_bytes()).hexdigest() == data.sha256


def interrupted(count: int) -> NoReturn:
    raise KeyboardInterrupt


def test_a_failure_in_the_middle_leaves_nothing_under_a_final_name(source: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "before").write_bytes(b"what was there")
    wanted = {tmp_path / "fresh": BINDINGS, tmp_path / "before": BINDINGS[:3]}
    with pytest.raises(KeyboardInterrupt):
        write_data(wanted, source, interrupted)
    assert not (tmp_path / "fresh").exists()
    assert (tmp_path / "before").read_bytes() == b"what was there"
    data = write_data(wanted, source).files
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256 for path, file in data.items())


@pytest.mark.parametrize("size", [10, 100_000], ids=["noticed when flushed", "noticed when written"])
def test_a_disk_that_is_full_stops_the_pass(
    tmp_path: Path, miniature: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """The writing thread's error is raised: `/dev/full` accepts no byte."""

    @contextmanager
    def into_a_full_disk(path: Path) -> Iterator[Path]:
        with atomic_write(path) as part:
            if path.name == "data":
                part.symlink_to("/dev/full")
            yield part

    monkeypatch.setattr(external_data, "atomic_write", into_a_full_disk)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({f"t{number:02}": np.ones(size, np.float32) for number in range(20)}, folder / FILE)
    source = replace(open_checkpoint(miniature), folder=folder, tensors=index_tensors(folder, [FILE]))
    bindings = [Binding(name, name, "float32", (size,)) for name in source.tensors]
    counted: list[int] = []
    with pytest.raises(OSError, match="No space left on device"):
        write_data({tmp_path / "good": bindings, tmp_path / "data": bindings}, source, counted.append)
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "good").exists()
    assert size == 10 or len(counted) <= external_data.QUEUED  # the rest need not be read


@pytest.mark.parametrize("transpose", [False, True])
def test_memory_is_a_few_blocks_however_large_the_tensor(
    tmp_path: Path, miniature: Path, small: Callable[..., None], transpose: bool
) -> None:
    """16 MB of fp32 from bf16, in blocks of 64 KB and strips of 512 KB."""
    folder, shape, block, strip = tmp_path / "large", (2048, 2048), 1 << 16, 1 << 19
    folder.mkdir()
    small(BLOCK=block, STRIP=strip)
    save_file({"large": np.ones(shape, ml_dtypes.bfloat16)}, folder / FILE)
    source = replace(open_checkpoint(miniature), folder=folder, tensors=index_tensors(folder, [FILE]))
    binding = Binding("w", "large", "float32", shape, transpose)
    tracemalloc.start()
    try:
        data = written([binding], source, tmp_path / "data")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert data.size == 4 * prod(shape)
    # A block that is read, its result (twice as large), and the blocks that wait to be written.
    assert peak < (1 + 2 * (external_data.QUEUED + 2)) * block + (strip if transpose else 0) + 100_000
