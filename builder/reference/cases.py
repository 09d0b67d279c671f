"""What a bundle is verified on: the cases of the shipped files (builder/suite) and of the user's, and a checkpoint's
held-out set.

The same files give the same cases and, for one checkpoint, the same images.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from builder.checkpoint.load import Checkpoint
from builder.reference.case_file import CHECKS, TOKENS, Tag, Tolerance, Written, read_file
from builder.reference.synthetic_images import SizeLimits, draw
from builder.util.errors import CasesError

MAX_PATCHES = 2500  # patches: a case of ten thousand costs minutes and adds the few positions of its question

SUITE = Path(__file__).parents[1] / "suite"
IMAGES = SUITE / "images"
__all__ = ["CHECKS", "IMAGES", "SUITE", "TOKENS", "Case", "Suite", "held_out", "read_cases", "shipped_cases"]


@dataclass(frozen=True)
class Case:
    """One question; what is not described here is as in `builder.reference.case_file.Entry`.

    Args:
        answer: the expected text where there is one (held-out sets).
        tolerance: of its gates, see `builder.verify.tolerances`.
        drawn: which of `images` were drawn for this checkpoint.
        shipped: whether it is one of builder/suite.
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
        """What is not compared, and could be: without images there are no features."""
        images = ("features", "runtime") if not self.images else ()
        return tuple(check for check in CHECKS if check not in (*self.checks, *images))


@dataclass(frozen=True)
class Suite:
    """What a verification asks: `cases` compared place by place, `tasks` by the text of their answers.

    Args:
        tokens: greedy tokens a case, at most; a case may ask for fewer.
    """

    cases: tuple[Case, ...]
    tasks: tuple[Case, ...] = ()
    tokens: int = TOKENS


def whole_suite(checkpoint: Checkpoint, folder: Path, more: Sequence[Path] = ()) -> Suite:
    """Every shipped case, those of the files `more`, and the checkpoint's held-out set.

    Args:
        folder: where images are drawn.
        more: files, or folders of them.

    Raises:
        CasesError: see `read_cases`.
    """
    return Suite(suite_cases(checkpoint, folder, more), held_out(checkpoint))


def suite_cases(checkpoint: Checkpoint, folder: Path, more: Sequence[Path] = ()) -> tuple[Case, ...]:
    """The same without the held-out set, which is not even read."""
    return placed(read_cases((SUITE, *more)), SizeLimits.of(checkpoint), folder)


def read_cases(paths: Sequence[Path]) -> tuple[Written, ...]:
    """The cases that files, or all `*.toml` files right in folders, describe; in order, folders' files by name.

    Raises:
        CasesError: a file or folder that holds no cases, a file that says what cannot be carried out, or a name that
            two cases have.
    """
    written = []
    for path in paths:
        files = sorted(path.glob("*.toml")) if path.is_dir() else [path]
        if not files:
            raise CasesError(f"{path} holds no cases", expected="*.toml files in it", found="none")
        written += [case for file in files for case in read_file(file)]
    twice = [name for name, count in Counter(case.name for case in written).items() if count > 1]
    if twice:
        where = sorted({str(case.file) for case in written if case.name == twice[0]})
        raise CasesError(
            f"two cases are called {twice[0]!r}",
            expected="a name of its own for each case, those that are shipped included",
            found=", ".join(where),
            next="give one of them another name",
        )
    return tuple(written)


def placed(written: Sequence[Written], limits: SizeLimits, folder: Path) -> tuple[Case, ...]:
    """The same with every image in a file: what is drawn is drawn into `folder`.

    Raises:
        CasesError: an image of more patches than the checkpoint takes.
    """
    cases = []
    for case in written:
        images = [image if isinstance(image, Path) else draw(image, limits, folder, case) for image in case.images]
        drawn = tuple(not isinstance(image, Path) for image in case.images)
        keys = {**vars(case.entry), "images": tuple(images)}
        cases.append(Case(**keys, drawn=drawn, shipped=case.file.parent == SUITE))
    return tuple(cases)


def layerwise(cases: Sequence[Case]) -> tuple[Case, ...]:
    """The shipped cases tagged "layerwise", and every case that the user added."""
    return tuple(case for case in cases if not case.shipped or "layerwise" in case.tags)


def shipped_cases() -> tuple[Case, ...]:
    """Those shipped cases that are the same for every checkpoint: all but the ones with drawn images."""
    same = [case for case in read_cases((SUITE,)) if all(isinstance(image, Path) for image in case.images)]
    return placed(same, SizeLimits(1, 1, 1, 1), SUITE)


def held_out(checkpoint: Checkpoint) -> tuple[Case, ...]:
    """The cases of `heldout/cases.jsonl` beside the checkpoint's folder (the miniature has one), or none.

    A line is {"task", "images", "question", "answer"}; images lie beside the file.
    """
    return _beside(checkpoint, "heldout")


def read_calibration(checkpoint: Checkpoint) -> tuple[Case, ...]:
    """Those of `calibration/cases.jsonl`, which quantization may look at: what the checkpoint is for. Or none."""
    return _beside(checkpoint, "calibration")


def _beside(checkpoint: Checkpoint, name: str) -> tuple[Case, ...]:
    file = checkpoint.folder.resolve().parent / name / "cases.jsonl"
    if not file.is_file():
        return ()
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return tuple(
        Case(row["task"], row["question"], tuple(file.parent / name for name in row["images"]), row["answer"])
        for row in rows
    )
