"""Goldens: what PyTorch makes of every case, kept in one small file, so that a bundle can be verified without PyTorch.

In: a checkpoint and cases. Out: a JSON file: inputs as digests, outputs as samples with the scale of their tensor,
greedy tokens with PyTorch's lead at each. Guaranteed: figures are kept to the last bit (hex floats); a file names the
checkpoint, the cases and the versions that it was made from; what is read is of this format, and whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from builder.checkpoint.load import Checkpoint
from builder.reference.cases import SUITE, Case, held_out, placed, read_cases
from builder.reference.synthetic_images import SizeLimits
from builder.targets.clients.pipeline import load_image
from builder.util import machine
from builder.util.errors import GoldenError, ResourceError
from builder.util.files import sha256, write_text
from builder.util.progress import progress
from builder.util.units import size
from builder.verify.golden.file import FORMAT, Golden, GoldenCase, Made, PictureMark, Sample, Task, text
from builder.verify.graphs.compare import ENDS
from builder.verify.memory_budget import verify_memory, verify_mode

if TYPE_CHECKING:
    from builder.reference.model import Prompt, Reference

Array = npt.NDArray[Any]
SAMPLES = 64  # of a tensor; of a layer's residual stream, half of it
TOP = 8  # largest logits of a position
TOKENS, TASK_TOKENS = 32, 16  # greedy tokens of a case, at most, and of a held-out answer
MADE_WITH = ("torch", "transformers", "numpy", "pillow", "tokenizers")
POSITIONS = tuple(end - 1 for end in ENDS)  # of which logits are compared: the last of each call of the decoder


def write_golden(reference: Reference, output: Path, more: Sequence[Path] = ()) -> Golden:
    """Runs PyTorch on every case and keeps what it gave.

    Args:
        output: the file, replaced as a whole.
        more: files of cases besides the shipped ones, or folders of them.

    Raises:
        CasesError: see `builder.reference.cases.read_cases`.
        GoldenError: `output` cannot be written.
    """
    checkpoint = reference.checkpoint
    limits, tasks = SizeLimits.of(checkpoint), held_out(checkpoint)
    written = read_cases((SUITE, *more))
    with TemporaryDirectory() as folder, progress("golden", len(written) + len(tasks)) as advance:
        cases = []
        for case in placed(written, limits, Path(folder)):
            cases.append(golden_case(case, reference))
            advance()
        answers = []
        for task in tasks:
            answers.append(reference.text(reference.generate(_prepared(task, reference), TASK_TOKENS).tokens))
            advance()
    golden = Golden(
        FORMAT,
        made_from(checkpoint),
        {name: version(name) for name in MADE_WITH},
        (limits.patch, limits.merge, limits.least, limits.most),
        checkpoint.image_token_id,
        checkpoint.text.hidden,
        tuple(cases),
        Task(task_digest(tasks), tuple(answers)) if tasks else None,
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, text(golden))
    except OSError as error:
        raise GoldenError(
            f"{output} cannot be written",
            expected="a file that can be",
            found=error.strerror,
            next="give another --output",
        ) from None
    return golden


def golden_of(checkpoint: Checkpoint, output: Path, more: Sequence[Path] = (), memory: int | None = None) -> Golden:
    """`write_golden` of a checkpoint.

    Args:
        memory: bytes that may be used; None for all that this process may have.

    Raises:
        ResourceError: PyTorch with all of the checkpoint does not fit in memory.
    """
    from builder.reference.model import Reference

    available = machine.memory_limit() if memory is None else memory
    if verify_mode(checkpoint, available) != "whole":
        raise ResourceError(
            "a golden needs PyTorch with the whole checkpoint in memory",
            expected=f"about {size(verify_memory(checkpoint)[0])}",
            found=size(available),
            next="make it on a machine with more memory; the file is small, and is used anywhere",
        )
    return write_golden(Reference(checkpoint), output, more)


def golden_case(case: Case, reference: Reference) -> GoldenCase:
    """Everything that the case's checks ask for, from PyTorch."""
    prompt = _prepared(case, reference)
    kept: dict[str, Any] = {}
    if prompt.pixel_values is not None and prompt.image_grid_thw is not None:
        kept["pixel_values"] = pixel_digests(prompt.pixel_values, prompt.image_grid_thw)
        kept["grids"] = tuple(tuple(row) for row in prompt.image_grid_thw.tolist())
    if {"embeddings", "decoder", "tokens"} & set(case.checks):
        kept |= _traced(case, reference, prompt)
    elif "features" in case.checks and prompt.pixel_values is not None and prompt.image_grid_thw is not None:
        main, levels = reference.vision(prompt.pixel_values, prompt.image_grid_thw)
        kept["features"] = _samples(case, "features", (main, *levels))
    if "tokens" in case.checks:
        count = min(case.max_new_tokens, TOKENS)
        answer = reference.generate(prompt, count, count)
        kept |= {"tokens": answer.tokens, "margins": " ".join(map(_hex, answer.margins))}
    ids = tuple(prompt.input_ids[0].tolist())
    return GoldenCase(case.name, case_digest(case), picture_marks(case), ids, digest(prompt.position_ids), **kept)


def _traced(case: Case, reference: Reference, prompt: Prompt) -> dict[str, tuple[Sample, ...]]:
    from builder.verify.graphs.sessions import merged

    trace = reference.hidden_states(prompt, keep=-min(POSITIONS))
    empty = np.zeros((0, reference.checkpoint.text.hidden), np.float32)
    main, *levels = trace.features or [empty] * (1 + len(reference.checkpoint.vision.deepstack))
    ids = prompt.input_ids
    embeds, spread = merged(reference.embed(ids), ids == reference.image_token_id, main, levels)
    kept = {
        "vision": _samples(case, "vision", trace.vision, SAMPLES // 2),
        "features": _samples(case, "features", trace.features),
        "embeddings": _samples(case, "embeddings", (embeds, *spread)),
        "decoder": _samples(case, "decoder", trace.decoder, SAMPLES // 2),
        "logits": tuple(_logits(case, trace.logits[position], position) for position in POSITIONS),
    }
    asked = {"features": ("vision", "features"), "embeddings": ("embeddings",), "decoder": ("decoder", "logits")}
    return {name: kept[name] for check, names in asked.items() if check in case.checks for name in names}


def _prepared(case: Case, reference: Reference) -> Prompt:
    return reference.prepare(case.prompt, case.images, lifted=case.lifted)


def _samples(case: Case, place: str, tensors: Sequence[Array], count: int = SAMPLES) -> tuple[Sample, ...]:
    return tuple(sampled(one, f"{case.name} {place} {number}", count) for number, one in enumerate(tensors))


def sampled(tensor: Array, seed: str, count: int = SAMPLES) -> Sample:
    """`count` values, one from each of as many stretches of equal length: every part of a tensor has its samples."""
    rng = np.random.default_rng(int(hashlib.sha256(seed.encode()).hexdigest()[:16], 16))
    edges = np.linspace(0, tensor.size, min(count, tensor.size) + 1).astype(np.int64)
    return _sample(tensor, rng.integers(edges[:-1], edges[1:]))


def _logits(case: Case, row: Array, position: int) -> Sample:
    top = np.argsort(row)[::-1][:TOP]
    rest = np.asarray(sampled(row, f"{case.name} logits {position}", SAMPLES // 2).at, np.int64)
    return _sample(row, np.concatenate([top, rest[~np.isin(rest, top)]]))


def _sample(tensor: Array, at: Array) -> Sample:
    std = float(tensor.std(dtype=np.float64)) if tensor.size else 0.0
    values = " ".join(_hex(float(value)) for value in tensor.reshape(-1)[at])
    return Sample(tuple(tensor.shape), _hex(std), tuple(int(one) for one in at), values)


def _hex(value: float) -> str:
    """`float.hex` without the zeros that fill it up; `float.fromhex` reads both."""
    mantissa, _, exponent = value.hex().partition("p")
    whole, _, part = mantissa.partition(".")
    digits = part.rstrip("0")
    return f"{whole}{'.' if digits else ''}{digits}p{exponent}" if exponent else mantissa


def digest(array: Array) -> str:
    """SHA-256 (hex) of an array's type, shape and bytes."""
    head = f"{array.dtype.str} {tuple(array.shape)} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def pixel_digests(pixels: Array, grids: Array) -> tuple[str, ...]:
    """Of each picture's rows of pixel_values [patches, …]; grids [images, 3]."""
    ends = np.cumsum(grids.prod(axis=1))[:-1]
    return tuple(digest(rows) for rows in np.split(pixels, ends))


def picture_marks(case: Case) -> tuple[PictureMark, ...]:
    """Of each picture of a case, decoded as a bundle's client decodes it."""
    marks = []
    for number, path in enumerate(case.images):
        image = load_image(path)
        rgb = hashlib.sha256(image.tobytes()).hexdigest()
        drawn = case.drawn and case.drawn[number]
        marks.append(PictureMark(None if drawn else sha256(path), rgb, image.size))
    return tuple(marks)


def case_digest(case: Case) -> str:
    """SHA-256 of all that decides what PyTorch makes of a case, but the way in which its picture files are decoded."""
    marks = [mark.file or mark.rgb for mark in picture_marks(case)]
    said = [case.name, case.prompt, marks, case.checks, case.tolerance, case.max_new_tokens, case.lifted]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def task_digest(tasks: Sequence[Case]) -> str:
    """SHA-256 of a held-out set's questions and pictures."""
    said = [[task.name, task.prompt, [sha256(path) for path in task.images]] for task in tasks]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def made_from(checkpoint: Checkpoint) -> Made:
    """What tells this checkpoint from every other; reads all its bytes."""
    files = {name: sha256(checkpoint.folder / name) for name in checkpoint.files}
    return Made(checkpoint.name, checkpoint.revision, checkpoint.config_digest, files)
