"""Fingerprint the files of a checkpoint, for cache keys."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from builder.checkpoint.files import notice_files
from builder.checkpoint.hub import MEGABYTE, pin_revision
from builder.checkpoint.load import Checkpoint, open_checkpoint
from builder.checkpoint.source import Source
from builder.util.errors import CheckpointError
from builder.util.json_files import MAX_TEXT, read_json
from builder.util.progress import progress

FETCHED, NOTICES = "checkpoint.json", "notices"
WEIGHTS = ".safetensors"
BLOCK = 8 * MEGABYTE


def resolve(source: Source) -> Source:
    """Pin a hub revision to a commit, after the checks that need no weights; return a local source as it is.

    Raises:
        DownloadError: the hub cannot be reached, or does not have the repository or revision.
        BuildError: a config, or file names, that `builder.checkpoint.load` refuses.
    """
    return source if source.repo is None else pin_revision(source)


def hub_fingerprint(source: Source) -> dict[str, str]:
    """Return what a resolved hub source adds to a cache key: its id and commit."""
    return {"repository": str(source.repo), "revision": str(source.revision)}


def folder_fingerprint(checkpoint: Checkpoint, *, rehash: bool = False) -> dict[str, str]:
    """Return what a local checkpoint adds to a cache key: its name, and each file that a build reads → its fingerprint.

    Args:
        rehash: hash weight files completely, rather than their size, modification time and header.

    Raises:
        CheckpointError: a file is no longer readable.
    """
    folder = checkpoint.folder
    try:
        files = (*checkpoint.files, *notice_names(folder))
        fingerprints = {file: file_fingerprint(folder / file, rehash) for file in files}
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder} changed since it was opened",
            expected="a readable file",
            found=error.strerror or str(error),
            next="let whatever writes it finish, then run the same command again",
        ) from error
    return {"checkpoint name": checkpoint.name, **fingerprints}


def open_fetched(out: Path) -> Checkpoint:
    """Open the checkpoint that the stage `fetch` recorded in `out`.

    Raises:
        CheckpointError: the stage did not complete, or the checkpoint's folder is gone.
    """
    record = read_json(out / FETCHED)
    folder = Path(record["folder"])
    if not folder.is_dir():
        raise CheckpointError(
            f"the checkpoint that was fetched is gone from {folder}",
            expected=f"the folder that {out / FETCHED} names",
            found="no such folder",
            next=f"{record['command']} --force fetch",
        )
    return open_checkpoint(folder, name=record["name"], revision=record["revision"])


def notice_names(folder: Path) -> tuple[str, ...]:
    """Return the names of the license files, notices and model card in `folder`, without any over `MAX_TEXT` bytes."""
    names = (path.name for path in folder.iterdir() if path.is_file() and path.stat().st_size <= MAX_TEXT)
    return notice_files(names)


def file_fingerprint(path: Path, rehash: bool = False) -> str:
    """Return the SHA-256 of a file; of weights, unless `rehash`, the size, time and SHA-256 of the header."""
    if rehash or path.suffix != WEIGHTS:
        return f"sha256 {cached_sha256(path)}"
    stat = path.stat()
    with path.open("rb") as file:
        header = file.read(8)
        header += file.read(int.from_bytes(header, "little"))
    return f"{stat.st_size} bytes, time {stat.st_mtime_ns}, header {hashlib.sha256(header).hexdigest()}"


def cases_fingerprint(source: Source, name: str) -> str:
    """Return the SHA-256 over all files of the folder `name` next to a local checkpoint; "none" if it has no cases."""
    folder = None if source.folder is None else source.folder.resolve().parent / name
    if folder is None or not (folder / "cases.jsonl").is_file():
        return "none"
    lines = [f"{file.name} {file_fingerprint(file)}" for file in sorted(folder.iterdir()) if file.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def cached_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, hashed once per process: with `--rehash`, the cache key and the stage need it."""
    stat = path.stat()
    return _sha256_of_state(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256_of_state(path: Path, size: int, _time: int) -> str:
    digest = hashlib.sha256()
    with progress(f"sha256 of {path.name}, MB", total=size // MEGABYTE) as advance, path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            advance(len(block) // MEGABYTE)
    return digest.hexdigest()
