"""Ways to corrupt a checkpoint folder, each a function of the folder, for use in test tables."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from builder.checkpoint.tensors import EMBEDDINGS, LM_HEAD

Change = Callable[[Path], object]
Header = dict[str, Any]


def edit_json(file: str, edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        edit(content)
        (folder / file).write_text(json.dumps(content))

    return change


def config(**values: Any) -> Change:
    """Change `config.json`; `text__x` is in `text_config`, `rope__x` in its rope parameters."""

    def edit(content: dict[str, Any]) -> None:
        for key, value in values.items():
            part, _, name = key.rpartition("__")
            text = content["text_config"]
            parts = {
                "": content,
                "text": text,
                "vision": content["vision_config"],
                "rope": text["rope_parameters"],
            }
            parts[part][name] = value

    return edit_json("config.json", edit)


def write(file: str, content: bytes = b"{}") -> Change:
    return lambda folder: (folder / file).write_bytes(content)


def remove(pattern: str) -> Change:
    def change(folder: Path) -> None:
        for path in list(folder.glob(pattern)):
            path.unlink()

    return change


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def edit_header(file: str, edit: Callable[[Header], object], *, tail: bytes = b"") -> Change:
    """Replace the header of a safetensors file, with the same data."""

    def change(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        edit(header)
        text = json.dumps(header).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :] + tail)

    return change


def edit_tensors(file: str, edit: Callable[[dict[str, Any]], object]) -> Change:
    """Rewrite a safetensors file with other tensors."""

    def change(folder: Path) -> None:
        tensors = dict(load_file(folder / file))
        edit(tensors)
        save_file(tensors, folder / file)

    return change


def truncate(file: str, keep: float) -> Change:
    return lambda folder: os.truncate(folder / file, int((folder / file).stat().st_size * keep))


def retype(dtype: str) -> Callable[[Header], None]:
    """Declare the first tensor as another type with one byte per element."""

    def edit(header: Header) -> None:
        entry = next(value for name, value in header.items() if name != "__metadata__")
        begin, end = entry["data_offsets"]
        entry |= {"dtype": dtype, "shape": [end - begin]}

    return edit


def last_offsets(first: int, second: int) -> Callable[[Header], None]:
    """Move the data of the last tensor of a file."""

    def edit(header: Header) -> None:
        entries = [value for name, value in header.items() if name != "__metadata__"]
        entry = max(entries, key=lambda value: value["data_offsets"][1])
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = [begin + first, end + second]

    return edit


def tie_head(values: Callable[[Any], Any]) -> Change:
    return edit_tensors("model.safetensors", lambda t: t.update({LM_HEAD: values(t[EMBEDDINGS].copy())}))


def rewritten(path: Path) -> None:
    """Change the last byte; the size stays the same."""
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 1]))
