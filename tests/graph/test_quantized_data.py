"""quantized_data: streamed parts equal those of complete matrices, quantized and packed at once."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from builder.checkpoint import shard_reader
from builder.checkpoint.load import Checkpoint, open_checkpoint
from builder.checkpoint.safetensors import index_tensors
from builder.graph import external_data
from builder.graph.binding import Binding
from builder.graph.external_data import layout, write_data
from builder.quantization import blockwise as arithmetic
from builder.quantization.blockwise import Blocks, Quantized, quantize
from builder.quantization.packing import lookup_shape, packed_parts, parts
from tests.helpers.small_graphs import Array, drawn

# q and v in the first file, k and the rest in the second: their rows are read from both.
FILES: dict[str, dict[str, Array]] = {
    "model-1.safetensors": {"q": drawn(24, 64), "v": drawn(16, 64, seed=2).astype(ml_dtypes.bfloat16)},
    "model-2.safetensors": {
        "k": drawn(8, 64, seed=1).astype(np.float16),
        "table": drawn(50, 96),
        "vector": drawn(64),
        "other": drawn(8, 64),
    },
}
TENSORS = {name: array for tensors in FILES.values() for name, array in tensors.items()}
INT4, ZERO = Blocks(4, 32, search="mse"), Blocks(4, 32, zero_points=True)
INT8 = Blocks(8, 16, zero_points=True, search="mse")


def parted(blocks: Blocks, *tensors: str, scales: str = "float32") -> list[Binding]:
    """The bindings of a quantized matrix, as `quantize_weights` makes them."""
    rows, columns = sum(len(TENSORS[name]) for name in tensors), TENSORS[tensors[0]].shape[1]
    name, below = "+".join(tensors), tensors[1:]
    return [
        Binding(
            f"{name}.{part}",
            tensors[0],
            scales if part == "scales" else "uint8",
            (rows, columns),
            below=below,
            blocks=blocks,
            part=part,
        )
        for part in parts(blocks)
    ]


def whole(binding: Binding) -> bytes:
    """The complete part, or plain tensor."""
    rows = np.concatenate([TENSORS[name].astype(np.float32) for name in binding.tensors])
    if binding.blocks is None or binding.part is None:
        return rows.astype(binding.dtype).tobytes()
    return packed_parts(quantize(rows, binding.blocks), binding.blocks, binding.dtype)[binding.part].tobytes()


@pytest.fixture
def source(tmp_path: Path, miniature: Path) -> Checkpoint:
    """A checkpoint of `TENSORS`, in two files."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file, tensors in FILES.items():
        save_file(dict(tensors), folder / file)
    return replace(open_checkpoint(miniature), folder=folder, tensors=index_tensors(folder, list(FILES)))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows at a time, so that each matrix has several blocks, none of which ends with a piece."""
    monkeypatch.setattr(shard_reader, "BLOCK", 1300)
    monkeypatch.setattr(arithmetic, "PIECE", 200)


def assert_whole(bindings: Sequence[Binding], source: Checkpoint, path: Path) -> None:
    data = write_data({path: bindings}, source).files[path]
    content = path.read_bytes()
    assert set(data.placements) == {binding.content for binding in bindings}
    for binding in bindings:
        offset, length = data.placements[binding.content]
        assert length == binding.nbytes
        assert content[offset : offset + length] == whole(binding), binding.initializer
    assert data.size == len(content)
    assert data.sha256 == hashlib.sha256(content).hexdigest()


MIXED = [
    *parted(INT4, "q", "k", "v"),
    *parted(ZERO, "table", scales="float16"),
    *parted(INT8, "other"),
    Binding("vector", "vector", "float32", (64,)),
    Binding("again", "other", "float16", (8, 64)),
]


@pytest.mark.parametrize("blocks", [INT4, ZERO, INT8], ids=str)
@pytest.mark.parametrize("scales", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tensor", ["q", "k", "v", "table"])
def test_a_matrix_of_any_type(
    source: Checkpoint, tmp_path: Path, small: None, blocks: Blocks, scales: str, tensor: str
) -> None:
    assert_whole(parted(blocks, tensor, scales=scales), source, tmp_path / "data")


@pytest.mark.parametrize("order", [("q", "k", "v"), ("k", "q", "v"), ("v", "k", "q")], ids="".join)
def test_rows_of_several_tensors_in_two_files(
    source: Checkpoint, tmp_path: Path, small: None, order: tuple[str, ...]
) -> None:
    assert_whole(parted(INT4, *order), source, tmp_path / "data")


def test_the_order_of_members_is_that_of_their_rows(source: Checkpoint, tmp_path: Path) -> None:
    """A control: the same tensors in another order give other bytes."""
    first, second = (parted(INT4, *order)[0] for order in (("q", "k", "v"), ("q", "v", "k")))
    write_data({tmp_path / "one": [first, *parted(INT4, "q", "k", "v")[1:]]}, source)
    assert whole(first) != whole(second)
    assert (tmp_path / "one").read_bytes()[: first.nbytes] == whole(first)


def test_quantized_and_plain_contents_in_the_same_file(source: Checkpoint, tmp_path: Path, small: None) -> None:
    assert_whole(MIXED, source, tmp_path / "data")
    assert_whole(list(reversed(MIXED)), source, tmp_path / "again")
    assert (tmp_path / "data").read_bytes() == (tmp_path / "again").read_bytes()


def test_one_tensor_in_two_formats(source: Checkpoint, tmp_path: Path, small: None) -> None:
    """Also without quantization, and as a member of another matrix."""
    bindings = [*parted(INT4, "other"), *parted(INT8, "other"), *parted(INT4, "other", "k"), MIXED[-1]]
    assert_whole(bindings, source, tmp_path / "data")


def test_the_parts_of_a_matrix_are_next_to_each_other(source: Checkpoint) -> None:
    """Codes, scales, zero points: they are made together."""
    placed = sorted(layout(MIXED, source).items(), key=lambda item: item[1])
    names = [content.part for content, _ in placed if content.tensor == "table"]
    assert names == ["levels", "scales", "zero_points"]
    at = [number for number, (content, _) in enumerate(placed) if content.tensor == "table"]
    assert at == list(range(at[0], at[0] + 3))
    assert all(begin + length <= after for (_, (begin, length)), (_, (after, _)) in pairwise(placed))


def test_a_view_of_the_same_bytes_is_the_same_content(source: Checkpoint, tmp_path: Path) -> None:
    bindings = parted(ZERO, "table")
    viewed = replace(bindings[0], initializer="lookup", view=lookup_shape("levels", ZERO, 50, 96))
    assert viewed.stored_shape == (50, 48)
    assert bindings[0].stored_shape == (50, 3, 16)
    assert layout([*bindings, viewed], source) == layout(bindings, source)
    assert_whole([*bindings, viewed], source, tmp_path / "data")


def test_calibrated_rows_replace_quantization(source: Checkpoint, tmp_path: Path, small: None) -> None:
    """The calibrated rows of k are between those of q and v, which are quantized as usual."""
    known = quantize(drawn(8, 64, seed=77), INT4)
    reads: list[str] = []

    def given() -> Quantized:
        reads.append("k")
        return known

    bindings = parted(INT4, "q", "k", "v")
    path = tmp_path / "data"
    data = write_data({path: bindings}, source, calibrated={"k": given}).files[path]
    assert reads == ["k"]
    for binding in bindings:
        assert binding.part is not None
        offset, length = data.placements[binding.content]
        pieces = [
            packed_parts(known if name == "k" else quantize(TENSORS[name].astype(np.float32), INT4), INT4, "float32")
            for name in binding.tensors
        ]
        want = np.concatenate([piece[binding.part] for piece in pieces]).tobytes()
        assert path.read_bytes()[offset : offset + length] == want


def test_several_files_in_one_pass(source: Checkpoint, tmp_path: Path, small: None) -> None:
    """Each file equals that of a separate pass, and the checkpoint's files have their digests."""
    wanted = {tmp_path / "one": MIXED[:4], tmp_path / "two": MIXED[2:]}
    written = write_data(wanted, source)
    for path, bindings in wanted.items():
        alone = write_data({tmp_path / "alone": bindings}, source).files[tmp_path / "alone"]
        assert written.files[path] == alone
    digests = {file: hashlib.sha256((source.folder / file).read_bytes()).hexdigest() for file in FILES}
    assert written.shards == digests


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("block", [1, 700, 1 << 20])
def test_blocks_and_threads_change_nothing(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, block: int
) -> None:
    monkeypatch.setattr(external_data, "WORKERS", workers)
    monkeypatch.setattr(shard_reader, "BLOCK", block)
    assert_whole(MIXED, source, tmp_path / "data")


def failing(block: Array, blocks: Blocks) -> Quantized:
    raise MemoryError("no room for a block")


def test_a_failure_of_a_worker_is_that_of_the_pass(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builder.graph.quantized_data.quantize", failing)
    with pytest.raises(MemoryError, match="no room for a block"):
        write_data({tmp_path / "data": MIXED}, source)
    assert not (tmp_path / "data").exists()


def test_memory_is_a_few_blocks_and_the_scales(
    tmp_path: Path, miniature: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 MB of fp32 from bf16, in blocks of 32 KB."""
    folder, shape, block = tmp_path / "large", (2048, 1024), 1 << 15
    folder.mkdir()
    monkeypatch.setattr(shard_reader, "BLOCK", block)
    monkeypatch.setattr(external_data, "QUEUED", 8)
    monkeypatch.setattr(arithmetic, "PIECE", 1 << 13)
    save_file({"large": np.ones(shape, ml_dtypes.bfloat16)}, folder / "model.safetensors")
    tensors = index_tensors(folder, ["model.safetensors"])
    source = replace(open_checkpoint(miniature), folder=folder, tensors=tensors)
    bindings = [
        Binding(part, "large", "float32" if part == "scales" else "uint8", shape, blocks=INT4, part=part)
        for part in parts(INT4)
    ]
    tracemalloc.start()
    try:
        data = write_data({tmp_path / "data": bindings}, source).files[tmp_path / "data"]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    scales = prod(shape) // 32 * 4
    assert data.size == prod(shape) // 2 + scales
    # In addition to the scales: blocks that wait to be written, and a few being quantized.
    assert peak < scales + (2 * external_data.QUEUED + 8) * block + 100_000 < prod(shape)
