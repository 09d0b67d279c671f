"""In: a checkpoint's generation_config.json. Out: the same, checked.

Guaranteed: the tokens that begin, end and fill an answer are rows of the embedding matrix, and the sampling settings
are numbers, so that they can be written into a bundle's settings as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builder.util.errors import CheckpointError

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
NUMBERS = ("temperature", "top_k", "top_p", "repetition_penalty")
MOST = 1e6


def check_generation(raw: Mapping[str, Any], file: str, vocab: int) -> Mapping[str, Any]:
    """`raw`, which came from `file`.

    Raises:
        CheckpointError: a token id that is none, or a sampling setting that is no number.
    """
    for key in TOKENS:
        value = raw.get(key)
        # An answer may end in several ways; it begins, and is filled up, in one.
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if value is not None and not all(type(one) is int and 0 <= one < vocab for one in ids):
            raise CheckpointError(f"{file}: {key} is no token", expected=f"an id below {vocab}", found=value)
    for key in NUMBERS:
        value = raw.get(key)
        if value is not None and (type(value) not in (int, float) or not 0 <= value <= MOST):
            raise CheckpointError(f"{file}: {key} is no number", expected=f"a number from 0 to {MOST:g}", found=value)
    return raw
