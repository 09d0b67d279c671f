"""write_data: what is streamed block by block is what the whole array would have been."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from builder.checkpoint import Checkpoint, open_checkpoint
from builder.errors import WeightError
from builder.graph import Binding
from builder.safetensors_index import index_tensors
from builder.weights import ALIGNMENT, BLOCK, DataFile, layout, write_data
from tests.small_graphs import Array, drawn

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
# Initializers in an order that is not the file's.
BINDINGS = (
    Binding("z.plain", "f32", "float32", (7, 5)),
    Binding("y.turned", "f32", "float32", (7, 5), transpose=True),
    Binding("x.half", "f16", "float32", (7, 5)),
    Binding("w.half_turned", "f16", "float32", (7, 5), transpose=True),
    Binding("v.brain", "bf16", "float32", (7, 5)),
    Binding("u.brain_turned", "bf16", "float32", (7, 5), transpose=True),
    Binding("t.vector", "vector", "float32", (9,)),
    Binding("s.conv", "conv", "float32", (6, 3, 2, 4, 4)),
    Binding("r.flat", "conv", "float32", (6, 96)),
    Binding("q.flat_turned", "conv", "float32", (6, 96), transpose=True),
    Binding("p.scalar", "scalar", "float32", ()),
    Binding("o.kept_half", "f16", "float16", (7, 5), transpose=True),
    Binding("n.kept_brain", "bf16", "bfloat16", (7, 5), transpose=True),
    Binding("m.empty", "empty", "float32", (0, 4)),
)


@pytest.fixture
def source(tmp_path: Path, miniature: Path) -> Checkpoint:
    """A checkpoint of `TENSORS` alone."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file(dict(TENSORS), folder / FILE)
    return replace(open_checkpoint(miniature), folder=folder, tensors=index_tensors(folder, [FILE]))


def whole(binding: Binding) -> Array:
    """The initializer, all at once."""
    array = TENSORS[binding.tensor].reshape(binding.shape)
    return np.ascontiguousarray((array.T if binding.transpose else array).astype(binding.dtype))


@pytest.mark.parametrize("block", [1, 4, 19, 64, 100, 1 << 20])
def test_every_block_size_gives_the_whole_arrays_bytes(source: Checkpoint, tmp_path: Path, block: int) -> None:
    data = write_data(BINDINGS, source, tmp_path / "data", block)
    content = (tmp_path / "data").read_bytes()
    placed = {placement.initializer: placement for placement in data.placements}
    assert set(placed) == {binding.initializer for binding in BINDINGS}
    for binding in BINDINGS:
        place, want = placed[binding.initializer], whole(binding)
        assert place.length == want.nbytes
        assert content[place.offset :][: place.length] == want.tobytes(), binding.initializer


@pytest.mark.parametrize("shape", ["biased", "deepstack0", "untied"])
def test_every_tensor_of_a_checkpoint(checkpoint: Callable[[str], Path], shape: str, tmp_path: Path) -> None:
    """bf16 in three shards, f16 in one file, f32 in two: Conv3d, matrices and vectors, as a model has them."""
    opened = open_checkpoint(checkpoint(shape))
    matrices = [name for name, tensor in opened.tensors.items() if len(tensor.shape) == 2]
    bindings = [Binding(name, name, "float32", tensor.shape) for name, tensor in opened.tensors.items()]
    bindings += [
        Binding(f"{name}.turned", name, "float32", opened.tensors[name].shape, transpose=True) for name in matrices[:5]
    ]
    data = write_data(bindings, opened, tmp_path / "data", block=1000)
    content, placed = np.fromfile(tmp_path / "data", np.uint8), {p.initializer: p for p in data.placements}
    for binding in bindings:
        place, want = placed[binding.initializer], opened.read(binding.tensor)
        got = content[place.offset : place.offset + place.length].view(np.float32).reshape(binding.stored_shape)
        np.testing.assert_array_equal(got, (want.T if binding.transpose else want).astype(np.float32))


def test_initializers_lie_on_pages_of_their_own_by_name(source: Checkpoint, tmp_path: Path) -> None:
    data = write_data(BINDINGS, source, tmp_path / "data")
    names = [placement.initializer for placement in data.placements]
    assert names == sorted(names)
    assert all(placement.offset % ALIGNMENT == 0 for placement in data.placements)
    spans = [(p.offset, p.offset + p.length) for p in data.placements if p.length]
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    assert data.size == (tmp_path / "data").stat().st_size == spans[-1][1]
    content = (tmp_path / "data").read_bytes()
    assert not any(any(content[end:begin]) for (_, end), (begin, _) in pairwise(spans))


def test_layout_depends_on_names_and_shapes_only() -> None:
    assert layout(BINDINGS) == layout(reversed(BINDINGS))
    turned = [binding.transposed() for binding in BINDINGS]
    assert layout(turned) == layout(BINDINGS)
    size = ALIGNMENT // 4
    exact = [Binding(name, "t", "float32", (size + more,)) for name, more in (("a", 0), ("b", 1), ("c", 0))]
    assert [placement.offset for placement in layout(exact)] == [0, ALIGNMENT, 3 * ALIGNMENT]


@pytest.mark.parametrize("block", [7, BLOCK])
def test_the_digest_is_that_of_the_file_and_the_same_each_time(source: Checkpoint, tmp_path: Path, block: int) -> None:
    first = write_data(BINDINGS, source, tmp_path / "one", block)
    second = write_data(tuple(reversed(BINDINGS)), source, tmp_path / "two")
    assert first == second == DataFile(first.placements, first.size, first.sha256)
    assert hashlib.sha256((tmp_path / "one").read_bytes()).hexdigest() == first.sha256
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_no_bindings_are_an_empty_file(source: Checkpoint, tmp_path: Path) -> None:
    data = write_data([], source, tmp_path / "data")
    assert (data.placements, data.size) == ((), 0)
    assert (tmp_path / "data").read_bytes() == b""


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        pytest.param(Binding("u.middle", "gone", "float32", (3,)), WeightError, id="no such tensor"),
        pytest.param(Binding("u.middle", "f32", "float32", (4, 4)), ValueError, id="another size"),
    ],
)
def test_a_failure_in_the_middle_leaves_no_file(
    source: Checkpoint, tmp_path: Path, broken: Binding, error: type[Exception]
) -> None:
    with pytest.raises(error):
        write_data([*BINDINGS, broken], source, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    data = write_data(BINDINGS, source, tmp_path / "data")
    assert hashlib.sha256((tmp_path / "data").read_bytes()).hexdigest() == data.sha256


def test_a_failure_in_the_middle_keeps_what_was_there(source: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"before")
    with pytest.raises(WeightError):
        write_data([*BINDINGS, Binding("u.middle", "gone", "float32", (3,))], source, tmp_path / "data")
    assert (tmp_path / "data").read_bytes() == b"before"


@pytest.mark.parametrize("transpose", [False, True])
def test_memory_is_a_few_blocks_however_large_the_tensor(tmp_path: Path, miniature: Path, transpose: bool) -> None:
    """16 MB of fp32 from bf16, in blocks of 64 KB."""
    folder, shape, block = tmp_path / "large", (2048, 2048), 1 << 16
    folder.mkdir()
    save_file({"large": np.ones(shape, ml_dtypes.bfloat16)}, folder / FILE)
    source = replace(open_checkpoint(miniature), folder=folder, tensors=index_tensors(folder, [FILE]))
    binding = Binding("w", "large", "float32", shape, transpose)
    write_data([binding], source, tmp_path / "warm", block)
    tracemalloc.start()
    try:
        data = write_data([binding], source, tmp_path / "data", block)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert data.size == 16 << 20
    assert peak < 8 * block
