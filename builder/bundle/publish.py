"""`qwen3vl-onnx publish`: a checked bundle becomes a repository on the hub.

In: a bundle, a repository's name, a branch. Out: a `Plan` (what is there, what is to be sent), then one commit.
Guaranteed: all files come in one commit, so that a repository has the old bundle or the new one; what has arrived in an
upload that broke off is not sent again (by the file, or by huggingface_hub's chunks where hf_xet is used); what the hub
has afterwards is what was checked, by digest. Connections, tokens, retries and the endpoint are huggingface_hub's.
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
    """A file, its bytes, and `new`, `changed` or `same`: what the repository has of it."""

    name: str
    size: int
    state: str


@dataclass(frozen=True)
class Plan:
    """What a publication would do.

    Args:
        exists: the repository; branch: the branch.
        commit: that the branch is at.
        others: files of the repository that are not the bundle's.
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
        return tuple(one for one in self.files if one.state != "same")

    def as_dict(self) -> dict[str, Any]:
        return {
            "repository": self.repo,
            "revision": self.revision,
            "repository exists": self.exists,
            "branch exists": self.branch,
            "files": [{"file": one.name, "size": one.size, "state": one.state} for one in self.files],
            "bytes to send": sum(one.size for one in self.sent),
            "others": list(self.others),
        }

    def renderables(self) -> Iterator[RenderableType]:
        """A row a file, and what is missing at the hub."""
        rows = ((one.name, size(one.size), one.state) for one in self.files)
        yield console_table(f"{self.repo}, {self.revision}", ("file", "size", "there"), rows, right=("size",))
        made = "" if self.exists and self.branch else "; the branch is made" if self.exists else "; it is made"
        yield f"to send: {len(self.sent)} files, {size(sum(one.size for one in self.sent))}{made}"


def plan(content: Content, repo: str, revision: str = MAIN) -> Plan:
    """What there is at the hub, compared with `content`.

    Raises:
        UploadError: the hub cannot be reached, or `repo` is no name.
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
        except RepositoryNotFoundError:  # of both, the more general
            exists = branch = False
    files = tuple(_upload(content, name, remotes.get(name)) for name in (*content.shipped, *content.evidence))
    others = sorted({*remotes} - {one.name for one in files} - {*OF_THE_HUB})
    return Plan(repo, revision, exists, branch, commit, files, tuple(others))


def publish(content: Content, asked: Plan, *, private: bool = False, prune: bool = False) -> str:
    """Send the bundle as one commit; returns the commit's address.

    Args:
        content: checked.
        asked: of the same content.
        private: make a repository that is not there yet a private one.
        prune: remove the repository's other files.

    Raises:
        UploadError: the hub did not take it, or has something else afterwards.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    repo, revision = asked.repo, asked.revision
    with _errors(repo):
        if not asked.exists:
            HfApi().create_repo(repo, private=private or None, exist_ok=True)
        if not asked.branch and revision != MAIN:
            HfApi().create_branch(repo, branch=revision, exist_ok=True)
        adds = [CommitOperationAdd(one.name, str(content.folder / one.name)) for one in asked.sent]
        deletes = [CommitOperationDelete(name, is_folder=False) for name in (asked.others if prune else ())]
        if not adds and not deletes:
            return _address(repo, asked.commit)
        done = HfApi().create_commit(
            repo,
            [*deletes, *adds],
            commit_message=f"{content.name}: manifest {sha256(content.folder / 'manifest.json')[:12]}",
            revision=revision,
            parent_commit=asked.commit,
        )
    after = plan(content, repo, done.oid)
    if after.sent:
        raise UploadError(
            f"{after.sent[0].name} at the hub is not what was sent",
            expected=f"every file of {content.folder}",
            found=", ".join(f"{one.name}: {one.state}" for one in after.sent[:8]),
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
            f"{repo} is no repository's name", expected="Org/Name", found=first_line(error), next="write Org/Name"
        ) from error
    except (OSError, transport_error(), RuntimeError, ValueError) as error:
        # What broke a file's upload lies behind the error that names the file.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        refused = status in (401, 403)
        raise UploadError(
            f"{repo}: " + (first_line(error) if isinstance(error, RuntimeError) else "the hub did not take it"),
            expected="an answer from the hub, and a token that may write there",
            found=f"{type(cause).__name__}: {first_line(cause)}",
            next="`hf auth login` with a token that may write to it, or set HF_TOKEN" if refused else None,
        ) from error
