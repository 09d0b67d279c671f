"""Write random checkpoints with the dimensions and tokenizer of the real models, laid out as by `save_pretrained`.

The same size and seed give the same bytes, and at most a block of a tensor is in memory. A complete folder is reused,
an incomplete folder rewritten.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt

from builder.checkpoint.safetensors import INDEX, SINGLE
from tests.helpers import checkpoints
from tests.helpers.checkpoints import SPECIAL_ROWS, SPECIAL_SCALE, spread, write_settings

MARKER = "synthetic.json"
SHARD_BYTES = 5 * 10**9
ITEM_BYTES = 2  # bf16
BLOCK = 4 << 20  # elements generated and written at a time
# Generating 8 billion normal values would take minutes, so each tensor reads a shared pool cyclically, from its own
# offset. The bench measures bytes, whatever their values; verification needs rows of a matrix that differ (equal rows
# would tie) and layers that differ. The pool's length is prime, hence not a multiple of a row's, so that no two rows
# start at the same place.
POOL = (1 << 23) - 15
# As in the settings of Qwen3-VL: the miniature's images are smaller.
PIXELS = {"shortest_edge": 65536, "longest_edge": 16777216}


@dataclass(frozen=True)
class Size:
    """Dimensions that differ from `tests.helpers.checkpoints` in `text_config` and `vision_config`."""

    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    deepstack: tuple[int, ...] = (1, 2, 3)
    tied: bool = True


def _text(hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, intermediate: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate,
        "max_position_embeddings": 262144,
    }


def _vision(depth: int, hidden: int, heads: int, intermediate: int) -> dict[str, Any]:
    return {
        "depth": depth,
        "hidden_size": hidden,
        "num_heads": heads,
        "intermediate_size": intermediate,
        "num_position_embeddings": 2304,
    }


SIZES: Mapping[str, Size] = {
    "tiny": Size(),
    "mid": Size(_text(512, 8, 8, 4, 64, 1536), _vision(8, 256, 4, 1024), (1, 3, 5)),
    "2b": Size(_text(2048, 28, 16, 8, 128, 6144), _vision(24, 1024, 16, 4096), (5, 11, 17)),
    "4b": Size(_text(2560, 36, 32, 8, 128, 9728), _vision(24, 1024, 16, 4096), (5, 11, 17)),
    "8b": Size(_text(4096, 36, 32, 8, 128, 12288), _vision(27, 1152, 16, 4304), (8, 16, 24), tied=False),
}


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Return name → shape of every weight of `SIZES[size]`."""
    with TemporaryDirectory() as folder:
        return _settings(Path(folder) / "settings", size)[0]


def is_complete(folder: Path, size: str, seed: int = 0) -> bool:
    """Whether `write_synthetic` completed `folder` with these arguments and this code."""
    try:
        return bool(json.loads((folder / MARKER).read_bytes()) == _facts(size, seed))
    except (OSError, ValueError):
        return False


def write_synthetic(folder: Path, size: str, seed: int = 0) -> Path:
    """Write the checkpoint `SIZES[size]` in bf16, replacing anything else in `folder`."""
    if is_complete(folder, size, seed):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    weights, first_special = _settings(folder, size)
    pool = np.random.default_rng(seed).standard_normal(POOL, dtype=np.float32)
    shards = _shards(weights)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        with (folder / file).open("wb") as stream:
            stream.write(_header({name: weights[name] for name in names}))
            for name in names:
                _write_tensor(stream, name, weights[name], _parts(name, weights[name], first_special), pool, seed)
    if len(shards) > 1:
        count = sum(map(prod, weights.values()))
        metadata = {"total_parameters": count, "total_size": count * ITEM_BYTES}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (folder / MARKER).write_text(json.dumps(_facts(size, seed), indent=2) + "\n")
    return folder


def _settings(folder: Path, size: str) -> tuple[dict[str, tuple[int, ...]], int]:
    """Write everything but weights; return their shapes, and the id of the first special token."""
    dimensions = SIZES[size]
    rope = {"rope_type": "default", "rope_theta": 5000000}
    made = write_settings(
        folder,
        text=dimensions.text,
        vision=dimensions.vision,
        tied=dimensions.tied,
        deepstack=dimensions.deepstack,
        rope=rope,
        tokenizer="qwen3",
    )
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(settings | {"size": PIXELS}, indent=2) + "\n")
    return made


def _facts(size: str, seed: int) -> dict[str, Any]:
    code = b"".join(Path(str(file)).read_bytes() for file in (__file__, checkpoints.__file__))
    facts: dict[str, Any] = json.loads(json.dumps(asdict(SIZES[size])))
    return {**facts, "seed": seed, "code": hashlib.sha256(code).hexdigest()}


def _shards(weights: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """Return the tensors of each file, in order, as many as fit in `SHARD_BYTES`."""
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, shape in weights.items():
        size = prod(shape) * ITEM_BYTES
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    return shards


def _header(weights: Mapping[str, tuple[int, ...]]) -> bytes:
    """Return length and text of a safetensors header, padded to eight bytes like the reference implementation."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in weights.items():
        end = offset + prod(shape) * ITEM_BYTES
        table[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parts(name: str, shape: tuple[int, ...], first_special: int) -> list[tuple[int, float]]:
    """Return the consecutive parts of a tensor: number of elements, and their scale."""
    count = prod(shape)
    if name not in SPECIAL_ROWS:
        return [(count, 1.0)]
    ordinary = first_special * shape[1]
    return [(ordinary, 1.0), (count - ordinary, SPECIAL_SCALE)]


def _write_tensor(
    stream: BinaryIO,
    name: str,
    shape: tuple[int, ...],
    parts: list[tuple[int, float]],
    pool: npt.NDArray[np.float32],
    seed: int,
) -> None:
    mean, deviation = spread(name, shape)
    place = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
    for count, scale in parts:
        for noise in _around(pool, place, count):
            values = noise * np.float32(deviation * scale) + np.float32(mean)
            stream.write(values.astype(ml_dtypes.bfloat16).view(np.uint8).data)
        place += count


def _around(pool: npt.NDArray[np.float32], place: int, count: int) -> Iterator[npt.NDArray[np.float32]]:
    """Yield `count` elements of the pool from `place` on, cyclically, at most `BLOCK` at a time."""
    while count:
        start = place % len(pool)
        piece = pool[start : start + min(count, BLOCK)]
        yield piece
        place, count = place + len(piece), count - len(piece)
