"""Fingerprints of a checkpoint: what tells its files from those of another."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from builder.checkpoint.files import notice_files
from builder.checkpoint.hub import MEGABYTE, settle
from builder.checkpoint.load import Checkpoint, open_checkpoint
from builder.checkpoint.source import Source
from builder.util.errors import CheckpointError
from builder.util.json_files import MAX_TEXT, read_json
from builder.util.progress import progress

FETCHED, NOTICES = "checkpoint.json", "notices"
WEIGHTS = ".safetensors"
BLOCK = 8 * MEGABYTE


def resolve(source: Source) -> Source:
    """The source with a hub revision settled as a commit, after the checks that need no weights.

    Raises:
        DownloadError: the hub cannot be reached, or does not have it.
        BuildError: a config, or file names, that `builder.checkpoint.load` refuses.
    """
    return source if source.repo is None else settle(source)


def hub_fingerprint(source: Source) -> dict[str, str]:
    """What a resolved hub source adds to a stage key: its id and commit."""
    return {"repository": str(source.repo), "revision": str(source.revision)}


def folder_fingerprint(checkpoint: Checkpoint, *, rehash: bool = False) -> dict[str, str]:
    """What a local checkpoint adds to a stage key: its name, and each file that a build reads → its fingerprint.

    Args:
        rehash: fingerprint weight files by all their bytes, rather than by size, time and header.
    """
    folder = checkpoint.folder
    files = (*checkpoint.files, *_notices(folder))
    return {"checkpoint name": checkpoint.name, **{file: file_fingerprint(folder / file, rehash) for file in files}}


def open_fetched(out: Path) -> Checkpoint:
    """Open the checkpoint that the stage `fetch` recorded in `out`.

    Raises:
        CheckpointError: the stage did not end, or its folder is gone.
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


def _notices(folder: Path) -> tuple[str, ...]:
    """Names of licenses, notices and the card in `folder`; none that is larger than a text."""
    names = (path.name for path in folder.iterdir() if path.is_file() and path.stat().st_size <= MAX_TEXT)
    return notice_files(names)


def file_fingerprint(path: Path, rehash: bool = False) -> str:
    """SHA-256 of a file; of weights, unless `rehash`, size, time and SHA-256 of the header."""
    if rehash or path.suffix != WEIGHTS:
        return f"sha256 {_sha256(path)}"
    stat = path.stat()
    with path.open("rb") as file:
        header = file.read(8)
        header += file.read(int.from_bytes(header, "little"))
    return f"{stat.st_size} bytes, time {stat.st_mtime_ns}, header {hashlib.sha256(header).hexdigest()}"


def cases_fingerprint(source: Source, name: str) -> str:
    """SHA-256 over all files of the folder `name` next to a local checkpoint; "none" where it holds no cases."""
    folder = None if source.folder is None else source.folder.resolve().parent / name
    if folder is None or not (folder / "cases.jsonl").is_file():
        return "none"
    lines = [f"{file.name} {file_fingerprint(file)}" for file in sorted(folder.iterdir()) if file.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _sha256(path: Path) -> str:
    stat = path.stat()
    return _sha256_of(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256_of(path: Path, size: int, _time: int) -> str:
    """Once a process for each state of a file: `--rehash` asks before the stage does."""
    digest = hashlib.sha256()
    with progress(f"sha256 of {path.name}, MB", total=size // MEGABYTE) as advance, path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            advance(len(block) // MEGABYTE)
    return digest.hexdigest()
