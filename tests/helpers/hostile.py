"""Tables of hostile checkpoints, and what tests do with them, with bundles and with images. No torch.

Changes are named, or a few bytes chosen by a seed; the same name or seed gives the same bytes. `outcome` requires a
value or a `BuildError` in bounded time.
"""

from __future__ import annotations

import json
import os
import random
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from builder.util.errors import BuildError
from tests.helpers.edits import Change, both, config, edit_header, edit_json, edit_tensors, remove, truncate, write

SECONDS = 10.0  # of a separate process, for one input
INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00002.safetensors"
SETTINGS, WORDS = "preprocessor_config.json", "tokenizer.json"
NORM = "model.language_model.norm.weight"
HUGE = 10**4000  # fits a Python integer but not a float, and is just accepted by json
# Written by hand: json would not produce these.
ODD_NUMBERS = (b"NaN", b"-Infinity", b"1e999", b"-1", b"0", b"9" * 4000, b"9" * 10_000, b"1e-400", b"true", b'"1"')
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    HUGE,
    1e308,
    "",
    "\ud800",
    "x" * 100_000,
    [],
    [[]],
    [HUGE],
    {},
    {"": []},
)


def outcome(action: Callable[[], object]) -> str:
    """`accepted`, or the type of `BuildError` that `action` raises; other exceptions propagate."""
    before = time.process_time()
    found = _refusal(action)
    assert time.process_time() - before < SECONDS, "it took too long"
    if found is None:
        return "accepted"
    assert found.what, "an error that says nothing"
    assert len(str(found)) < 10_000, "an error that nobody reads to its end"
    json.dumps(found.as_dict())
    assert 10 <= found.exit_code < 70, type(found)
    return type(found).__name__


def _refusal(action: Callable[[], object]) -> BuildError | None:
    try:
        action()
    except BuildError as error:
        return error
    return None


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and modification time of everything under `folder`."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        found[path.relative_to(folder).as_posix()] = (stat.st_size, stat.st_mtime_ns)
    return found


# --- safetensors files ---


def header_bytes(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file with any header and any declared length."""
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def first_entry(**values: Any) -> Change:
    """Replace the header's entry of the first tensor."""

    def edit(header: dict[str, Any]) -> None:
        next(value for name, value in header.items() if name != "__metadata__").update(values)

    return edit_header(SHARD, edit)


def lying(number: int) -> Change:
    return first_entry(data_offsets=[0, number])


HEADERS: Mapping[str, Change] = {
    "empty file": write(SHARD, b""),
    "seven bytes": write(SHARD, b"\1" * 7),
    "half of it": truncate(SHARD, 0.5),
    "no data": truncate(SHARD, 0.02),
    "length 2^63": write(SHARD, header_bytes(b"{}", length=2**63)),
    "length 2^64 - 1": write(SHARD, header_bytes(b"{}", length=2**64 - 1)),
    "length one too many": write(SHARD, header_bytes(b"{}", length=3)),
    "length 0": write(SHARD, header_bytes(b"")),
    "sparse, of 17 MB of header": lambda f: _sparse(f / SHARD, 17 * 2**20),
    "sparse, 4 TB": both(first_entry(data_offsets=[0, 2**42]), lambda f: os.truncate(f / SHARD, 2**42)),
    "no UTF-8": write(SHARD, header_bytes(b'{"\xff\xfe": {}}')),
    "half a surrogate": write(SHARD, header_bytes(b'{"\\ud800": {}}')),
    "deep lists": write(SHARD, header_bytes(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")),
    "deep objects": write(SHARD, header_bytes(b'{"a":' * 900 + b"1" + b"}" * 900)),
    "a list": write(SHARD, header_bytes(b"[]")),
    "key twice": write(SHARD, header_bytes(b'{"a":{},"a":{}}')),
    "many keys, the last twice": write(
        SHARD, header_bytes(b"{" + b",".join(b'"%d":1' % i for i in range(200_000)) + b',"199999":1}')
    ),
    "many names": write(
        SHARD,
        header_bytes(
            b"{"
            + b",".join(b'"model.x%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(50_000))
            + b"}"
        ),
    ),
    "long name": edit_header(SHARD, lambda h: h.update({"model." + "x" * 1_000_000: h.pop(next(iter(h)))})),
    "name with a terminal's codes": edit_header(SHARD, lambda h: h.update({"\x1b[2J\0": h.pop(next(iter(h)))})),
    "negative offset": first_entry(data_offsets=[-8, 8]),
    "end before begin": first_entry(data_offsets=[8, 0]),
    "end 2^63": lying(2**63),
    "end 2^64": lying(2**64),
    "end of 4,000 digits": lying(HUGE),
    "end is a float": first_entry(data_offsets=[0, 8.0]),
    "end is true": first_entry(data_offsets=[False, True]),
    "one offset": first_entry(data_offsets=[0]),
    "offsets are text": first_entry(data_offsets="08"),
    "shape of 2^63": first_entry(shape=[2**63]),
    "shape whose product overflows": first_entry(shape=[2**32, 2**32]),
    "shape of huge numbers": first_entry(shape=[HUGE] * 8),
    "shape of very many huge numbers": first_entry(shape=[HUGE] * 2000),
    "shape of many axes": first_entry(shape=[1] * 100_000),
    "negative shape": first_entry(shape=[-1, -64]),
    "shape is an object": first_entry(shape={}),
    "empty tensor": first_entry(shape=[0, 2**40], data_offsets=[0, 0]),
    "unknown dtype": first_entry(dtype="F32\0"),
    "dtype is a list": first_entry(dtype=["F32"]),
    "quantized": first_entry(dtype="I8"),
    "overlap": edit_header(SHARD, lambda h: h.update({NORM + "x": dict(next(v for k, v in h.items() if k[0] != "_"))})),
    "trailing bytes": edit_header(SHARD, lambda h: None, tail=b"\0" * 64),
    "metadata is a list": edit_header(SHARD, lambda h: h.update(__metadata__=[1])),
    "a tensor of another model": edit_tensors(SHARD, lambda t: t.update({"model.extra": next(iter(t.values()))})),
    "a folder": both(remove(SHARD), lambda f: (f / SHARD).mkdir()),
    "a pipe": both(remove(SHARD), lambda f: os.mkfifo(f / SHARD)),
    "a link in a circle": both(remove(SHARD), lambda f: (f / SHARD).symlink_to(f / SHARD)),
    "a link to a device": both(remove(SHARD), lambda f: (f / SHARD).symlink_to("/dev/zero")),
}


def _sparse(path: Path, length: int) -> None:
    path.write_bytes(struct.pack("<Q", length))
    os.truncate(path, 8 + length)


# --- the index ---


def index_names(file: Any) -> Change:
    return edit_json(INDEX, lambda content: content["weight_map"].update({NORM: file}))


INDEXES: Mapping[str, Change] = {
    f"names {what}": index_names(file)
    for what, file in {
        "the parent's": "../outside.safetensors",
        "the parent's by a detour": "a/../../outside.safetensors",
        "an absolute path": "/etc/passwd.safetensors",
        "a device": "/dev/zero",
        "a drive": "C:\\x.safetensors",
        "a share": "\\\\host\\x.safetensors",
        "a URL": "http://host/x.safetensors",
        "a zero byte": "a\0.safetensors",
        "nothing": "",
        "a number": 7,
        "a list": [SHARD],
        "half a surrogate": "\ud800.safetensors",
        "10,000 letters": "x" * 10_000 + ".safetensors",
        "300 letters in a folder": "x" * 300 + "/a.safetensors",
        "50,000 folders": "a/" * 50_000 + "b.safetensors",
        "a pickle": "pytorch_model.bin",
        "a file that is not there": "model-00009-of-00002.safetensors",
        "a folder": "sub.safetensors",
    }.items()
} | {
    "map is a list": edit_json(INDEX, lambda c: c.update(weight_map=[[NORM, SHARD]])),
    "map is empty": edit_json(INDEX, lambda c: c.update(weight_map={})),
    "map of 100,000 files": edit_json(
        INDEX, lambda c: c["weight_map"].update({f"x{i}": f"{i}.safetensors" for i in range(100_000)})
    ),
    "linked folder": both(
        lambda f: (f / "sub").symlink_to("/etc", target_is_directory=True), index_names("sub/passwd.safetensors")
    ),
    "is a list": write(INDEX, b"[]"),
    "is a pipe": both(remove(INDEX), lambda f: os.mkfifo(f / INDEX)),
}

# --- JSON files ---

COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "vocab_size", "intermediate_size")
VISION_COUNTS = ("depth", "hidden_size", "num_heads", "patch_size", "num_position_embeddings", "spatial_merge_size")


def spelled(file: str, key: str, number: bytes) -> Change:
    """Replace every value of `key` by text that json would not write."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        marked = json.dumps(content, default=str).encode()
        needle = json.dumps(key).encode() + b": "
        at = marked.find(needle) + len(needle)
        end = at + len(json.dumps(_first(content, key)).encode())
        (folder / file).write_bytes(marked[:at] + number + marked[end:])

    return change


def _first(content: Any, key: str) -> Any:
    if not isinstance(content, dict):
        raise KeyError(key)
    for name, value in content.items():
        if name == key:
            return value
        if isinstance(value, dict):
            try:
                return _first(value, key)
            except KeyError:
                continue
    raise KeyError(key)


CONFIGS: Mapping[str, Change] = (
    {f"text {key} = {n}": config(**{f"text__{key}": n}) for key in COUNTS for n in (0, -1, 2**31 - 1, 2**63, HUGE)}
    | {f"vision {key} = {n}": config(**{f"vision__{key}": n}) for key in VISION_COUNTS for n in (0, 2**31 - 1, HUGE)}
    | {
        f"{part}{key} = {str(value)[:20]!r}": config(**{part + key: value})
        for part, key in (
            ("text__", "rms_norm_eps"),
            ("text__", "rope_parameters"),
            ("rope__", "rope_theta"),
            ("rope__", "mrope_section"),
            ("rope__", "rope_type"),
            ("text__", "eos_token_id"),
            ("vision__", "deepstack_visual_indexes"),
            ("", "image_token_id"),
            ("", "architectures"),
            ("", "model_type"),
            ("", "dtype"),
            ("", "text_config"),
            ("", "tie_word_embeddings"),
            ("", "auto_map"),
        )
        for value in ODD_VALUES
    }
    | {f"hidden_size spelled {n[:12].decode()}": spelled("config.json", "hidden_size", n) for n in ODD_NUMBERS}
    | {f"rms_norm_eps spelled {n[:12].decode()}": spelled("config.json", "rms_norm_eps", n) for n in ODD_NUMBERS}
    | {"key that holds a deep list": config(note=json.loads("[" * 500 + "]" * 500))}
)


def setting(file: str, key: str, value: Any) -> Change:
    return edit_json(file, lambda content: content.update({key: value}))


def added_tokens(key: str, value: Any) -> Change:
    """Do the same for every added token."""
    return edit_json(WORDS, lambda content: [token.update({key: value}) for token in content["added_tokens"]])


OTHER_FILES: Mapping[str, Change] = (
    {
        f"{file}: {what}": write(file, content)
        for file in ("config.json", SETTINGS, WORDS, "tokenizer_config.json", "generation_config.json", INDEX)
        for what, content in {
            "empty": b"",
            "zeros": b"\0" * 1000,
            "garbage": random.Random(0).randbytes(5000),
            "deep": b"[" * 1_000_000,
            "deep object": b'{"a":' * 990 + b"{}" + b"}" * 990,
            "a million lists": b'{"a":[' + b"[]," * 1_000_000 + b"[]]}",
            "a number of 100,000 digits": b'{"a":' + b"9" * 100_000 + b"}",
            "UTF-16": '{"a": 1}'.encode("utf-16"),
            "text": b'"text"',
        }.items()
    }
    | {
        f"{SETTINGS}: {key} = {str(value)[:20]!r}": setting(SETTINGS, key, value)
        for key in ("size", "image_mean", "image_std", "patch_size", "rescale_factor", "image_processor_type")
        for value in ODD_VALUES
    }
    | {
        f"{SETTINGS}: size from {low} to {high}": setting(
            SETTINGS, "size", {"shortest_edge": low, "longest_edge": high}
        )
        for low, high in ((1, HUGE), (2**40, 2**41), (2**31 - 1, 2**31 - 1), (2, 1), (0, 0), (1.5, 2))
    }
    | {
        f"{SETTINGS}: {key} spelled {n[:12].decode()}": spelled(SETTINGS, key, n)
        for key in ("image_mean", "shortest_edge", "longest_edge")
        for n in ODD_NUMBERS
    }
    | {
        f"generation_config.json: {key} = {str(value)[:20]!r}": setting("generation_config.json", key, value)
        for key in ("eos_token_id", "bos_token_id", "temperature", "do_sample", "top_k")
        for value in ODD_VALUES
    }
    | {
        f"{WORDS}: added token {name} = {str(value)[:20]!r}": added_tokens(name, value)
        for name in ("id", "content")
        for value in ODD_VALUES
    }
    | {
        f"{WORDS}: {key} = {str(value)[:20]!r}": setting(WORDS, key, value)
        for key in ("model", "added_tokens")
        for value in ODD_VALUES
    }
    | {
        f"tokenizer_config.json: {key} = {str(value)[:20]!r}": setting("tokenizer_config.json", key, value)
        for key in ("bos_token", "eos_token", "auto_map")
        for value in ODD_VALUES
    }
)

CHECKPOINTS: Mapping[str, Mapping[str, Change]] = {
    "safetensors header": HEADERS,
    "index": INDEXES,
    "config.json": CONFIGS,
    "other JSON file": OTHER_FILES,
}


# --- bytes ---


def mutated(content: bytes, rng: random.Random) -> bytes:
    """`content` with one to eight of: a bit turned, another byte or number, a piece lost or doubled, the end lost."""
    found = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        at, length = rng.randrange(len(found) + 1), rng.randint(1, 16)
        kind = rng.randrange(7)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            del found[at : at + length * rng.choice((1, 1, 1, 100))]
        elif kind == 3:
            found[at:at] = found[at : at + length]
        elif kind == 4:
            found[at : at + 1] = rng.choice(
                (b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\0", b"\xff", b"-", b"e9")
            )
        elif kind == 5:
            found[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**32, 2**63, 2**64 - 1)))
        elif rng.random() < 0.2:
            del found[at:]
    return bytes(found)


def record_counts(counts: Mapping[str, int], record: Callable[[str, object], None]) -> None:
    """Record the counts in the test results, and print them."""
    for kind, count in sorted(counts.items()):
        record(kind, count)
        print(f"{count:6} {kind}")
