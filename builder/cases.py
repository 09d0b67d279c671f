"""What a bundle is verified on: prompts and the pictures that come with the package.

In: package data, the checkpoint's sizes, and a held-out set beside it. Out: `Case`s.
Guaranteed: every case names files that exist; the same cases for every checkpoint.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from builder.checkpoint import Checkpoint

PICTURES = Path(__file__).parent / "pictures"
TOKENS = 64  # greedy tokens a case


@dataclass(frozen=True)
class Case:
    """One question. `answer` is the expected text where there is one (held-out sets)."""

    name: str
    prompt: str
    images: tuple[Path, ...] = ()
    answer: str | None = None


@dataclass(frozen=True)
class Suite:
    """What a verification asks: `cases` compared token by token, `tasks` by the text of their answers.

    Args:
        tokens: greedy tokens a case.
    """

    cases: tuple[Case, ...]
    tasks: tuple[Case, ...] = ()
    tokens: int = TOKENS


def whole_suite(checkpoint: Checkpoint, folder: Path) -> Suite:
    """Every shipped case, one whose picture is drawn into `folder`, and the checkpoint's held-out set."""
    return Suite((*shipped_cases(), own_size(checkpoint, folder)), held_out(checkpoint))


def own_size(checkpoint: Checkpoint, folder: Path) -> Case:
    """Noise that this checkpoint need not resize, whatever its patch, merge and picture sizes."""
    unit = checkpoint.vision.patch_size * checkpoint.vision.merge_size
    least, most = (checkpoint.preprocessor["size"][key] for key in ("shortest_edge", "longest_edge"))
    rows = math.ceil(math.sqrt(least) / unit)
    columns = rows + 2 if rows * (rows + 2) * unit**2 <= most else rows
    pixels = np.random.default_rng(0).integers(0, 256, (rows * unit, columns * unit, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "own_size.png")
    return Case("own size", "What is in the picture?", (folder / "own_size.png",))


def shipped_cases() -> tuple[Case, ...]:
    """Text; one, two and three pictures; sizes, orders and file formats that go wrong elsewhere."""
    table = {
        "text": ("Repeat: seven 7 blue ünïcode 你好.", ()),
        "one picture": ("What is in the picture?", ("plain.png",)),
        "wide, tall": ("Compare the pictures.", ("wide.png", "tall.png")),
        "tall, wide": ("Compare the pictures.", ("tall.png", "wide.png")),
        "two of one size": ("Which is larger?", ("plain.png", "plain.png")),
        "three pictures": ("Describe each.", ("tall.png", "plain.png", "wide.png")),
        "sides ≡ 16 mod 64": ("Read the number.", ("sixteen.png",)),
        "JPEG 4:2:0": ("What colour is it?", ("photo.jpg",)),
        "greyscale": ("Read the number.", ("grey.png",)),
        "RGBA": ("What shape is it?", ("alpha.png",)),
        "palette": ("What shape is it?", ("palette.png",)),
        "EXIF-rotated": ("Where is it?", ("rotated.jpg",)),
    }
    return tuple(
        Case(name, prompt, tuple(PICTURES / file for file in files)) for name, (prompt, files) in table.items()
    )


def held_out(checkpoint: Checkpoint) -> tuple[Case, ...]:
    """The cases of `heldout/cases.jsonl` beside the checkpoint's folder (the miniature has one), or none.

    A line is {"task", "images", "question", "answer"}; images lie beside the file.
    """
    file = checkpoint.folder.resolve().parent / "heldout" / "cases.jsonl"
    if not file.is_file():
        return ()
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return tuple(
        Case(row["task"], row["question"], tuple(file.parent / name for name in row["images"]), row["answer"])
        for row in rows
    )
