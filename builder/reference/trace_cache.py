"""Cache the traces of PyTorch in a folder.

The key covers inputs, package versions and weights (size, time and header of each file); an unreadable file is computed
again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from builder.checkpoint.fingerprint import file_fingerprint
from builder.reference.model import Prompt, Reference, Trace
from builder.util.files import atomic_write

COMPUTED_WITH = ("torch", "transformers", "numpy")


def traced(reference: Reference, prompt: Prompt, folder: Path, answer: Sequence[int] = ()) -> Trace:
    """Return `reference.hidden_states(prompt, answer)`, cached in `folder`."""
    path = folder / f"{_key(reference, prompt, answer)}.safetensors"
    try:
        return _unpacked(load_file(path))
    except (OSError, SafetensorError):
        trace = reference.hidden_states(prompt, answer)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        save_file(_packed(trace), part)
    return trace


def _key(reference: Reference, prompt: Prompt, answer: Sequence[int]) -> str:
    checkpoint = reference.checkpoint
    digest = hashlib.sha256()
    files = {file: file_fingerprint(checkpoint.folder / file) for file in checkpoint.files}
    computed_from = [files, {name: version(name) for name in COMPUTED_WITH}, list(answer)]
    digest.update(json.dumps(computed_from, sort_keys=True).encode())
    for array in (prompt.input_ids, prompt.pixel_values, prompt.image_grid_thw, prompt.position_ids):
        digest.update(b"-" if array is None else f"{array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()[:32]


def _packed(trace: Trace) -> dict[str, np.ndarray]:
    rows = {"vision": trace.vision, "features": trace.features, "decoder": trace.decoder, "logits": (trace.logits,)}
    return {f"{name}.{i}": np.ascontiguousarray(array) for name, row in rows.items() for i, array in enumerate(row)}


def _unpacked(arrays: dict[str, np.ndarray]) -> Trace:
    def row(name: str) -> tuple[np.ndarray, ...]:
        count = sum(key.startswith(f"{name}.") for key in arrays)
        return tuple(arrays[f"{name}.{i}"] for i in range(count))

    return Trace(row("vision"), row("features"), row("decoder"), arrays["logits.0"])
