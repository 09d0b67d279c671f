"""Record a golden: PyTorch's outputs for every case in a small file, to verify bundles without PyTorch.

Inputs are stored as digests, outputs as samples in hex floats (lossless), tokens with PyTorch's lead at each.
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

from builder.bundle.format1 import OLD_CASES
from builder.checkpoint.load import Checkpoint
from builder.reference.cases import SUITE, Case, held_out, placed, read_cases
from builder.reference.synthetic_images import SizeLimits
from builder.targets.clients.pipeline import load_image
from builder.util import machine
from builder.util.errors import GoldenError, ResourceError
from builder.util.files import sha256, write_text
from builder.util.progress import progress
from builder.util.units import size
from builder.verify.golden.file import FORMAT, CheckpointIdentity, Golden, GoldenCase, ImageDigest, Sample, Task, text
from builder.verify.graphs.compare import ENDS
from builder.verify.memory_budget import verify_memory, verify_mode

if TYPE_CHECKING:
    from builder.reference.model import Prompt, Reference

Array = npt.NDArray[Any]
SAMPLES = 64  # per tensor; half as many per residual stream
TOP = 8  # largest logits kept per position
TOKENS, TASK_TOKENS = 32, 16  # maximum number of greedy tokens of a case, and of a held-out answer
MADE_WITH = ("torch", "transformers", "numpy", "pillow", "tokenizers")
POSITIONS = tuple(end - 1 for end in ENDS)  # where logits are compared: the last position of each decoder call


def write_golden(reference: Reference, output: Path, more: Sequence[Path] = ()) -> Golden:
    """Run PyTorch on every case and write its outputs.

    Args:
        output: the golden file; replaced atomically.
        more: additional case files, or folders of them.

    Raises:
        CasesError: see `builder.reference.cases.read_cases`.
        GoldenError: `output` is not writable.
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
        checkpoint_identity(checkpoint),
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
            expected="a writable file",
            found=error.strerror,
            next="give another --output",
        ) from None
    return golden


def golden_of(checkpoint: Checkpoint, output: Path, more: Sequence[Path] = (), memory: int | None = None) -> Golden:
    """Load a checkpoint and call `write_golden`.

    Args:
        memory: bytes that may be used; None for the limit of this process.

    Raises:
        ResourceError: the complete checkpoint does not fit in memory in PyTorch.
    """
    from builder.reference.model import Reference

    available = machine.memory_limit() if memory is None else memory
    if verify_mode(checkpoint, available) != "whole":
        raise ResourceError(
            "a golden needs the complete checkpoint in memory, in PyTorch",
            expected=f"about {size(verify_memory(checkpoint)[0])}",
            found=size(available),
            next="make it on a machine with more memory; the file is small and can be used anywhere",
        )
    return write_golden(Reference(checkpoint), output, more)


def golden_case(case: Case, reference: Reference) -> GoldenCase:
    """Compute the outputs that the case's checks need."""
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
    return GoldenCase(case.name, case_digest(case), image_digests(case), ids, digest(prompt.position_ids), **kept)


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
    of_check = {"features": ("vision", "features"), "embeddings": ("embeddings",), "decoder": ("decoder", "logits")}
    return {name: kept[name] for check, names in of_check.items() if check in case.checks for name in names}


def _prepared(case: Case, reference: Reference) -> Prompt:
    return reference.prepare(case.prompt, case.images, lifted=case.lifted)


def _samples(case: Case, place: str, tensors: Sequence[Array], count: int = SAMPLES) -> tuple[Sample, ...]:
    return tuple(sampled(tensor, f"{_seed(case)} {place} {n}", count) for n, tensor in enumerate(tensors))


def _seed(case: Case) -> str:
    """The case's name in format 1: positions stay those that goldens of that format have."""
    return OLD_CASES.get(case.name, case.name)


def sampled(tensor: Array, seed: str, count: int = SAMPLES) -> Sample:
    """Sample `count` values, one from each of `count` equal stretches, so that every part of the tensor is covered."""
    rng = np.random.default_rng(int(hashlib.sha256(seed.encode()).hexdigest()[:16], 16))
    edges = np.linspace(0, tensor.size, min(count, tensor.size) + 1).astype(np.int64)
    return _sample(tensor, rng.integers(edges[:-1], edges[1:]))


def _logits(case: Case, row: Array, position: int) -> Sample:
    top = np.argsort(row)[::-1][:TOP]
    rest = np.asarray(sampled(row, f"{_seed(case)} logits {position}", SAMPLES // 2).at, np.int64)
    return _sample(row, np.concatenate([top, rest[~np.isin(rest, top)]]))


def _sample(tensor: Array, at: Array) -> Sample:
    std = float(tensor.std(dtype=np.float64)) if tensor.size else 0.0
    values = " ".join(_hex(float(value)) for value in tensor.reshape(-1)[at])
    return Sample(tuple(tensor.shape), _hex(std), tuple(map(int, at)), values)


def _hex(value: float) -> str:
    """`float.hex` without trailing zeros; `float.fromhex` reads both."""
    mantissa, _, exponent = value.hex().partition("p")
    integer, _, part = mantissa.partition(".")
    digits = part.rstrip("0")
    return f"{integer}{'.' if digits else ''}{digits}p{exponent}" if exponent else mantissa


def digest(array: Array) -> str:
    """Return the SHA-256 (hex) of an array's dtype, shape and bytes."""
    head = f"{array.dtype.str} {tuple(array.shape)} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def pixel_digests(pixels: Array, grids: Array) -> tuple[str, ...]:
    """Return the digest of each image's rows of pixel_values [patches, …]; grids: [images, 3]."""
    ends = np.cumsum(grids.prod(axis=1))[:-1]
    return tuple(digest(rows) for rows in np.split(pixels, ends))


def image_digests(case: Case) -> tuple[ImageDigest, ...]:
    """Return the digests of each image of a case, decoded as a bundle's client decodes it."""
    digests = []
    for number, path in enumerate(case.images):
        image = load_image(path)
        rgb = hashlib.sha256(image.tobytes()).hexdigest()
        synthetic = case.drawn and case.drawn[number]
        digests.append(ImageDigest(None if synthetic else sha256(path), rgb, image.size))
    return tuple(digests)


def case_digest(case: Case) -> str:
    """Return the SHA-256 of everything that determines a case's outputs, except how its image files are decoded."""
    images = [image.file or image.rgb for image in image_digests(case)]
    content = [case.name, case.prompt, images, case.checks, case.tolerance, case.max_new_tokens, case.lifted]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def task_digest(tasks: Sequence[Case]) -> str:
    """Return the SHA-256 of a held-out set's prompts and images."""
    content = [[task.name, task.prompt, [sha256(path) for path in task.images]] for task in tasks]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def checkpoint_identity(checkpoint: Checkpoint) -> CheckpointIdentity:
    """Identify a checkpoint by the digests of all its files."""
    files = {name: sha256(checkpoint.folder / name) for name in checkpoint.files}
    return CheckpointIdentity(checkpoint.name, checkpoint.revision, checkpoint.config_digest, files)
