"""The fingerprint of a local checkpoint in a cache key."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.checkpoint.fingerprint import folder_fingerprint
from builder.checkpoint.load import open_checkpoint
from builder.util.errors import CheckpointError


def test_a_file_that_disappears_after_opening_is_named(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert {*checkpoint.files, "checkpoint name"} <= folder_fingerprint(checkpoint).keys()
    shard = next(name for name in checkpoint.files if name.endswith(".safetensors"))
    (sharded / shard).unlink()
    with pytest.raises(CheckpointError, match="changed since it was opened") as caught:
        folder_fingerprint(checkpoint)
    assert shard in caught.value.what
