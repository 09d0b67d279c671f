"""Parse the argument CHECKPOINT: a local folder, or a hub repository with an optional revision."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from builder.util.errors import CheckpointError

COMMIT = re.compile(r"[0-9a-f]{40}")
# huggingface_hub's `validate_repo_id`, with the organisation required.
_PART = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_NOT_IN_IDS = ("--", "..")


@dataclass(frozen=True)
class Source:
    """Source of a checkpoint; either `folder` or `repo` is set.

    Args:
        name: short, for `outputs/<name>-<recipe>`.
        folder: a local folder, used in place.
        repo: a hub id, `Org/Name`.
        revision: a branch, tag or commit of the repository; None for its main branch.
    """

    name: str
    folder: Path | None = None
    repo: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        if self.repo is None:
            return str(self.folder)
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    @property
    def pinned(self) -> bool:
        """Whether the revision is a full commit."""
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None

    @property
    def command(self) -> str:
        """The command that builds this source again."""
        return f"qwen3vl-onnx build {shlex.quote(str(self))}"


def parse_source(text: str) -> Source:
    """Parse a folder that exists, else a hub id `Org/Name[@revision]`.

    Raises:
        CheckpointError: the text is neither.

    Example:
        >>> parse_source("Qwen/Qwen3-VL-2B-Instruct@main").revision
        'main'
    """
    path = Path(text).expanduser()
    if text and path.exists():
        return Source(name=path.resolve().name or "checkpoint", folder=path)
    match = _HUB_ID.fullmatch(text)
    repo = match["repo"] if match else ""
    if not match or any(part in text for part in _NOT_IN_IDS) or repo.endswith(".git"):
        raise CheckpointError(
            f"{text!r} is neither a folder nor a hub id",
            expected="a folder with a checkpoint, or Org/Name[@revision]",
            found="no such folder",
            next="check the spelling, or give the folder relative to " + str(Path.cwd()),
        )
    return Source(name=repo.rpartition("/")[2], repo=repo, revision=match["revision"])
