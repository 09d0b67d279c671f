"""Upload a checked bundle to the hub as one commit (`qwen3vl-onnx publish`).

Guarantees: the repository has the old bundle or the new one; files that an interrupted upload transferred are not sent
again (huggingface_hub does so per chunk where hf_xet is used); the hub's digests are compared with the bundle's
afterwards. Connections, tokens, retries and the endpoint are huggingface_hub's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType

from builder.bundle.inventory import OF_THE_HUB, Content
from builder.checkpoint.hub import Remote, first_line, remote_files, transport_error
from builder.util.console_table import console_table
from builder.util.errors import BuildError, UploadError
from builder.util.files import git_blob, sha256
from builder.util.units import size

MAIN = "main"


@dataclass(frozen=True)
class Upload:
    """A file, its size in bytes, and its state in the repository: `new`, `changed` or `same`."""

    name: str
    size: int
    state: str


@dataclass(frozen=True)
class Plan:
    """What `publish` would do.

    Args:
        exists: whether the repository exists.
        branch: whether the branch exists.
        commit: head of the branch.
        others: files of the repository that are not in the bundle.
    """

    repo: str
    revision: str
    exists: bool
    branch: bool
    commit: str | None
    files: tuple[Upload, ...]
    others: tuple[str, ...]

    @property
    def sent(self) -> tuple[Upload, ...]:
        return tuple(file for file in self.files if file.state != "same")

    def as_dict(self) -> dict[str, Any]:
        return {
            "repository": self.repo,
            "revision": self.revision,
            "repository exists": self.exists,
            "branch exists": self.branch,
            "files": [{"file": file.name, "size": file.size, "state": file.state} for file in self.files],
            "bytes to send": sum(file.size for file in self.sent),
            "others": list(self.others),
        }

    def renderables(self) -> Iterator[RenderableType]:
        """Yield a table of the files and a summary of what is sent or created."""
        rows = ((file.name, size(file.size), file.state) for file in self.files)
        yield console_table(f"{self.repo}, {self.revision}", ("file", "size", "state"), rows, right=("size",))
        created = "" if self.exists and self.branch else f"; creates the {'branch' if self.exists else 'repository'}"
        yield f"to send: {len(self.sent)} files, {size(sum(file.size for file in self.sent))}{created}"


def plan(content: Content, repo: str, revision: str = MAIN) -> Plan:
    """Compare the repository with the bundle.

    Raises:
        UploadError: the hub cannot be reached, or `repo` is not a valid name.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    exists, branch, commit = True, True, None
    remotes: Mapping[str, Remote] = {}
    with _errors(repo):
        try:
            info = HfApi().model_info(repo, revision=revision, files_metadata=True)
            commit, remotes = info.sha, remote_files(info)
        except RevisionNotFoundError:
            branch = False
        except RepositoryNotFoundError:
            exists = branch = False
    files = tuple(_upload(content, name, remotes.get(name)) for name in (*content.shipped, *content.evidence))
    others = sorted({*remotes} - {file.name for file in files} - {*OF_THE_HUB})
    return Plan(repo, revision, exists, branch, commit, files, tuple(others))


def publish(content: Content, planned: Plan, *, private: bool = False, prune: bool = False) -> str:
    """Upload the bundle as one commit, and return the commit's URL.

    Args:
        content: a checked bundle.
        planned: `plan` of the same bundle.
        private: whether a new repository is created private.
        prune: remove the repository's other files.

    Raises:
        UploadError: the hub refused the upload, or has different files afterwards.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    repo, revision = planned.repo, planned.revision
    with _errors(repo):
        if not planned.exists:
            HfApi().create_repo(repo, private=private or None, exist_ok=True)
        if not planned.branch and revision != MAIN:
            HfApi().create_branch(repo, branch=revision, exist_ok=True)
        adds = [CommitOperationAdd(file.name, str(content.folder / file.name)) for file in planned.sent]
        deletes = [CommitOperationDelete(name, is_folder=False) for name in (planned.others if prune else ())]
        if not adds and not deletes:
            return _address(repo, planned.commit)
        done = HfApi().create_commit(
            repo,
            [*deletes, *adds],
            commit_message=f"{content.name}: manifest {sha256(content.folder / 'manifest.json')[:12]}",
            revision=revision,
            parent_commit=planned.commit,
        )
    after = plan(content, repo, done.oid)
    if after.sent:
        raise UploadError(
            f"{after.sent[0].name} at the hub differs from the file that was sent",
            expected=f"every file of {content.folder}",
            found=", ".join(f"{file.name}: {file.state}" for file in after.sent[:8]),
        )
    return _address(repo, done.oid)


def _upload(content: Content, name: str, remote: Remote | None) -> Upload:
    path = content.folder / name
    length = path.stat().st_size
    if remote is None:
        return Upload(name, length, "new")
    if remote.size != length:
        return Upload(name, length, "changed")
    if remote.sha256 is not None:
        known = content.files.get(name)
        same = remote.sha256 == (known.sha256 if known else sha256(path))
    else:
        same = remote.git == git_blob(path)
    return Upload(name, length, "same" if same else "changed")


def _address(repo: str, commit: str | None) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}/commit/{commit}"


@contextmanager
def _errors(repo: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except BuildError:
        raise
    except errors.HFValidationError as error:
        raise UploadError(
            f"{repo} is not a repository name", expected="Org/Name", found=first_line(error), next="give it as Org/Name"
        ) from error
    except (OSError, transport_error(), RuntimeError, ValueError) as error:
        # The cause of a failed file upload is chained to the error that names the file.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        refused = status in (401, 403)
        raise UploadError(
            f"{repo}: " + (first_line(error) if isinstance(error, RuntimeError) else "the hub refused the upload"),
            expected="an answer from the hub, and a token that may write there",
            found=f"{type(cause).__name__}: {first_line(cause)}",
            next="run `hf auth login` with a token that may write to it, or set HF_TOKEN" if refused else None,
        ) from error
