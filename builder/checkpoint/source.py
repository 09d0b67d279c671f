"""In: what the user wrote for CHECKPOINT. Out: a `Source`: a local folder, or a hub repository and a
revision.

Guaranteed: nothing is read but whether the folder exists, and nothing is fetched.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from builder.util.errors import CheckpointError

COMMIT = re.compile(r"[0-9a-f]{40}")
# huggingface_hub's `validate_repo_id`, with the organisation demanded.
_PART = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_NOT_IN_IDS = ("--", "..")


@dataclass(frozen=True)
class Source:
    """Where a checkpoint comes from: either `folder` or `repo` is set.

    Args:
        name: short, for `outputs/<name>-<recipe>`.
        folder: a local folder, used in place.
        repo: a hub id, `Org/Name`.
        revision: of the repository: a branch, a tag or a commit; `None` for its main branch.
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
        """Whether it names one state for good: a full commit."""
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None

    @property
    def command(self) -> str:
        """What builds this source again."""
        return f"qwen3vl-onnx build {shlex.quote(str(self))}"


def parse_source(text: str) -> Source:
    """The source that `text` names: a folder that exists, else a hub id `Org/Name[@revision]`.

    Raises:
        CheckpointError: neither.
    """
    path = Path(text).expanduser()
    if text and path.exists():
        return Source(name=path.resolve().name or "checkpoint", folder=path)
    found = _HUB_ID.fullmatch(text)
    repo = found["repo"] if found else ""
    if not found or any(part in text for part in _NOT_IN_IDS) or repo.endswith(".git"):
        raise CheckpointError(
            f"{text!r} is neither a folder nor a hub id",
            expected="a folder with a checkpoint, or Org/Name[@revision]",
            found="no such folder",
            next="check the spelling, or name the folder from here: " + str(Path.cwd()),
        )
    return Source(name=repo.rpartition("/")[2], repo=repo, revision=found["revision"])
