"""Collect the cases that a bundle is verified on: shipped ones (builder/suite), the user's, and the held-out set.

The same files give the same cases and, for a checkpoint, the same images.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from builder.checkpoint.load import Checkpoint
from builder.reference.case_file import CHECKS, TOKENS, FileCase, Tag, Tolerance, read_file
from builder.reference.synthetic_images import SizeLimits, draw
from builder.util.errors import CasesError

MAX_PATCHES = 2500  # patches: a case of ten thousand takes minutes and adds only the positions of its question

SUITE = Path(__file__).parents[1] / "suite"
IMAGES = SUITE / "images"
__all__ = ["CHECKS", "IMAGES", "SUITE", "TOKENS", "Case", "Suite", "held_out", "read_cases", "shipped_cases"]


@dataclass(frozen=True)
class Case:
    """A prompt with images and what to compare; see `builder.reference.case_file.Entry` for the other fields.

    Args:
        answer: the expected text, in held-out sets.
        tolerance: of its gates, see `builder.verify.tolerances`.
        drawn: which of `images` are synthetic.
        shipped: whether the case is in builder/suite.
    """

    name: str
    prompt: str
    images: tuple[Path, ...] = ()
    answer: str | None = None
    checks: tuple[str, ...] = CHECKS
    tolerance: Tolerance = "fp32"
    max_new_tokens: int = TOKENS
    limits: Literal["kept", "lifted"] = "kept"
    tags: tuple[Tag, ...] = ()
    drawn: tuple[bool, ...] = ()
    shipped: bool = False

    @property
    def lifted(self) -> bool:
        """Whether images may have more pixels than the checkpoint allows."""
        return self.limits == "lifted"

    @property
    def unchecked(self) -> tuple[str, ...]:
        """Checks that the case leaves out, except those that need images where it has none."""
        images = ("features", "runtime") if not self.images else ()
        return tuple(check for check in CHECKS if check not in (*self.checks, *images))


@dataclass(frozen=True)
class Suite:
    """Cases of a verification: `cases` are compared place by place, `tasks` by the text of their answers.

    Args:
        tokens: most greedy tokens per case; a case may set fewer.
    """

    cases: tuple[Case, ...]
    tasks: tuple[Case, ...] = ()
    tokens: int = TOKENS


def whole_suite(checkpoint: Checkpoint, folder: Path, more: Sequence[Path] = ()) -> Suite:
    """Return all shipped cases, those of the files `more`, and the checkpoint's held-out set.

    Args:
        folder: for synthetic images.
        more: files, or folders of them.

    Raises:
        CasesError: see `read_cases`.
    """
    return Suite(suite_cases(checkpoint, folder, more), held_out(checkpoint))


def suite_cases(checkpoint: Checkpoint, folder: Path, more: Sequence[Path] = ()) -> tuple[Case, ...]:
    """Return the same cases without reading the held-out set."""
    return placed(read_cases((SUITE, *more)), SizeLimits.of(checkpoint), folder)


def read_cases(paths: Sequence[Path]) -> tuple[FileCase, ...]:
    """Read the cases of files, and of all `*.toml` files directly in folders (sorted by name), in order.

    Raises:
        CasesError: a file or folder without cases, an invalid file, or two cases with one name.
    """
    written = []
    for path in paths:
        files = sorted(path.glob("*.toml")) if path.is_dir() else [path]
        if not files:
            raise CasesError(f"{path} contains no cases", expected="*.toml files in it", found="none")
        written += [case for file in files for case in read_file(file)]
    duplicates = [name for name, count in Counter(case.name for case in written).items() if count > 1]
    if duplicates:
        where = sorted({str(case.file) for case in written if case.name == duplicates[0]})
        raise CasesError(
            f"two cases have the name {duplicates[0]!r}",
            expected="a unique name for each case, including the shipped ones",
            found=", ".join(where),
            next="give one of them another name",
        )
    return tuple(written)


def placed(written: Sequence[FileCase], limits: SizeLimits, folder: Path) -> tuple[Case, ...]:
    """Return the cases with all images as files, writing synthetic images to `folder`.

    Raises:
        CasesError: an image has more patches than the checkpoint accepts.
    """
    cases = []
    for case in written:
        images = [image if isinstance(image, Path) else draw(image, limits, folder, case) for image in case.images]
        drawn = tuple(not isinstance(image, Path) for image in case.images)
        keys = {**vars(case.entry), "images": tuple(images)}
        cases.append(Case(**keys, drawn=drawn, shipped=case.file.parent == SUITE))
    return tuple(cases)


def layerwise(cases: Sequence[Case]) -> tuple[Case, ...]:
    """Return the shipped cases tagged "layerwise", and all cases that the user added."""
    return tuple(case for case in cases if not case.shipped or "layerwise" in case.tags)


def shipped_cases() -> tuple[Case, ...]:
    """Return the shipped cases that do not depend on the checkpoint: those without synthetic images."""
    same = [case for case in read_cases((SUITE,)) if all(isinstance(image, Path) for image in case.images)]
    return placed(same, SizeLimits(1, 1, 1, 1), SUITE)


def held_out(checkpoint: Checkpoint) -> tuple[Case, ...]:
    """Read `heldout/cases.jsonl` next to the checkpoint's folder, if present.

    A line is {"task", "images", "question", "answer"}; images are relative to the file.
    """
    return _sibling_cases(checkpoint, "heldout")


def read_calibration(checkpoint: Checkpoint) -> tuple[Case, ...]:
    """Read `calibration/cases.jsonl` next to the checkpoint's folder, if present: typical inputs, for quantization."""
    return _sibling_cases(checkpoint, "calibration")


def _sibling_cases(checkpoint: Checkpoint, name: str) -> tuple[Case, ...]:
    file = checkpoint.folder.resolve().parent / name / "cases.jsonl"
    if not file.is_file():
        return ()
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return tuple(
        Case(row["task"], row["question"], tuple(file.parent / name for name in row["images"]), row["answer"])
        for row in rows
    )
