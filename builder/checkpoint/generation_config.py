"""Check generation_config.json, so that its values can be written into a bundle's settings unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builder.util.errors import CheckpointError

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
NUMBERS = ("temperature", "top_k", "top_p", "repetition_penalty")
MOST = 1e6


def check_generation(raw: Mapping[str, Any], file: str, vocab: int) -> Mapping[str, Any]:
    """Return `raw`, the content of `file`, after checking it.

    Raises:
        CheckpointError: a token id outside the vocabulary, or a sampling setting that is not a number.
    """
    for key in TOKENS:
        value = raw.get(key)
        # Only the end of a sequence may have several tokens.
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if value is not None and not all(type(token) is int and 0 <= token < vocab for token in ids):
            raise CheckpointError(f"{file}: {key} is not a token", expected=f"an id below {vocab}", found=value)
    for key in NUMBERS:
        value = raw.get(key)
        if value is not None and (type(value) not in (int, float) or not 0 <= value <= MOST):
            raise CheckpointError(
                f"{file}: {key} is not a number", expected=f"a number from 0 to {MOST:g}", found=value
            )
    return raw
