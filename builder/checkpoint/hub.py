"""Download the files that a build needs from the Hugging Face hub.

All files come from one commit, and an unsupported checkpoint is refused before its weights are fetched. Connections,
resuming, locks, the cache, tokens and the endpoint (`HF_ENDPOINT`) are those of huggingface_hub. Complete files survive
an interrupted download.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from builder.checkpoint.config import read_architecture
from builder.checkpoint.files import CONFIG, needed_files, notice_files, refuse_names, refuse_remote_code
from builder.checkpoint.safetensors import INDEX, weight_files
from builder.checkpoint.source import Source
from builder.util.errors import BuildError, CheckpointError, DownloadError
from builder.util.json_files import read_json
from builder.util.progress import progress

MEGABYTE = 10**6


@dataclass(frozen=True)
class Remote:
    """A file of a repository as the hub describes it; None where it does not.

    Args:
        size: in bytes.
        sha256: of the content, for files in LFS.
        git: git's blob id (SHA-1 of `blob <size>\\0` and the content), for all other files.
    """

    size: int | None = None
    sha256: str | None = None
    git: str | None = None


def pin_revision(source: Source) -> Source:
    """Replace the revision by its commit, and check the config and the file names.

    A commit whose config is in the cache needs no network; its file names are not checked here.

    Raises:
        DownloadError: the hub cannot be reached, or does not have the repository or revision.
        BuildError: a config or file names that `builder.checkpoint.load` would refuse.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    with _hub_errors(source):
        cached = try_to_load_from_cache(_repo(source), CONFIG, revision=source.revision) if source.pinned else None
        if isinstance(cached, str):
            _check_config(Path(cached))
            return source
        info = HfApi().model_info(_repo(source), revision=source.revision)
        if info.sha is None:
            raise DownloadError(f"the hub does not report the commit of {source}")
        refuse_names({file.rfilename for file in info.siblings or []}, str(source))
        pinned = replace(source, revision=info.sha)
        _check_config(_fetch_file(pinned, CONFIG))
        return pinned


def download(source: Source) -> tuple[Path, dict[str, Remote]]:
    """Download every file that a build needs, and the checkpoint's notices, to the cache.

    Returns:
        the folder of the snapshot, and the needed files as the hub describes them.

    Raises:
        DownloadError: the hub cannot be reached, or the connection drops repeatedly.
        CheckpointError: a file is missing.
        UnsafeError: an index that names a file outside the repository.
    """
    folder, files = list_needed(source)
    with _hub_errors(source):
        megabytes = sum(remote.size or 0 for remote in files.values()) // MEGABYTE
        with progress(f"{source.repo}, MB", total=megabytes) as advance:
            bar = _bar(advance)
            for file in (*files, *notice_files(_listing(source))):
                _fetch_file(source, file, bar)
    return folder, files


def list_needed(source: Source) -> tuple[Path, dict[str, Remote]]:
    """List the files that `download` fetches, fetching only the config and the index.

    Returns:
        the folder of the snapshot, and the needed files as the hub describes them.

    Raises:
        BuildError: as in `download`.
    """
    with _hub_errors(source):
        remotes = _listing(source)
        refuse_names(remotes, str(source))
        folder = _fetch_file(source, CONFIG).parent
        if INDEX in remotes:
            _fetch_file(source, INDEX)
        files = needed_files(remotes, weight_files(folder, remotes))
    for file in files:
        if file not in remotes:
            raise CheckpointError(f"{file} is missing from {source}", expected=f"{file}, which {INDEX} names")
    return folder, {file: remotes[file] for file in files}


def cache_folder() -> Path:
    """Return the folder of huggingface_hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _repo(source: Source) -> str:
    if source.repo is None:
        raise ValueError(f"{source} is not a hub repository")
    return source.repo


def _check_config(path: Path) -> None:
    config = read_json(path)
    refuse_remote_code(config, CONFIG)
    read_architecture(config)


def _listing(source: Source) -> dict[str, Remote]:
    """List the files of the repository, or if the hub cannot be reached, those of an earlier download."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        info = HfApi().model_info(_repo(source), revision=source.revision, files_metadata=True)
    except (OfflineModeIsEnabled, transport_error()) as error:
        config = try_to_load_from_cache(_repo(source), CONFIG, revision=source.revision)
        if isinstance(error, HfHubHTTPError) or not isinstance(config, str):
            raise
        folder = Path(config).parent
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): Remote() for path in files}
    return remote_files(info)


def remote_files(info: Any) -> dict[str, Remote]:
    """Return the files of a `ModelInfo` that was requested with `files_metadata`, by name."""
    return {
        file.rfilename: Remote(file.size, sha256=file.lfs.sha256) if file.lfs else Remote(file.size, git=file.blob_id)
        for file in info.siblings or []
    }


def _fetch_file(source: Source, file: str, bar: Any = None) -> Path:
    from huggingface_hub import HfApi

    bar = bar or _bar(lambda steps: None)
    return Path(HfApi().hf_hub_download(_repo(source), file, revision=source.revision, tqdm_class=bar))


def _bar(advance: Callable[[int], None]) -> type[Any]:
    """Return a `tqdm` class for huggingface_hub that reports megabytes to `advance`."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    seen = 0

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **settings: Any) -> None:
            settings.pop("name", None)
            super().__init__(*args, **{**settings, "disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal seen
            before, seen = seen, seen + int(n or 0)
            advance(seen // MEGABYTE - before // MEGABYTE)

    return Bar


def transport_error() -> type[Exception]:
    """Return the base error of the HTTP library that the installed huggingface_hub uses."""
    from huggingface_hub import errors

    error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    return error


@contextmanager
def _hub_errors(source: Source) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except BuildError:
        raise
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{source.repo} is gated",
            found=first_line(error),
            next=f"accept its conditions at {_page(source)}, then `hf auth login`, or set HF_TOKEN",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DownloadError(
            f"{source.repo} has no revision {source.revision}",
            found=first_line(error),
            next=f"pick a branch, a tag or a commit from {_page(source)}/commits",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(
            f"the hub has no repository {source.repo} that you can read, and there is no folder of that name",
            found=first_line(error),
            next="check the spelling; for a private repository, `hf auth login`, or set HF_TOKEN",
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise DownloadError(f"{source} does not have a file that it lists", found=first_line(error)) from error
    except (OSError, transport_error()) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DownloadError(
            f"{source} could not be downloaded",
            expected="an answer from " + _page(source),
            found=f"{type(error).__name__}: {first_line(error)}",
            next=f"{source.command} once the hub can be reached; complete files are not fetched again",
        ) from error


def _page(source: Source) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{source.repo}"


def first_line(error: BaseException) -> str:
    """Return the first non-blank line of an error's text, or the name of its type."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
