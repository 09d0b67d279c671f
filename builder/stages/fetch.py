"""The stage `fetch`: the checkpoint's files, on this disk, whole, and what each is.

In: a resolved `Source`. Out: `checkpoint.json` with the folder, the revision, and what tells every file that a
build needs from another; `notices/`: what the checkpoint says of its licence. Guaranteed: a local folder is used in
place and never written to, and its weights are not read: `builder.stages.quantize` takes their SHA-256 as they pass; a
download is of one commit, and its bytes are those that the hub names; the checkpoint opens (see
`builder.checkpoint.load`).
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.checkpoint.files import notice_files
from builder.checkpoint.hub import MEGABYTE, Remote, download, settle
from builder.checkpoint.load import Checkpoint, open_checkpoint
from builder.checkpoint.source import Source, parse_source
from builder.util.errors import CheckpointError, DownloadError
from builder.util.json_files import MAX_TEXT, read_json
from builder.util.progress import progress

if TYPE_CHECKING:
    from builder.stages.engine.build import Build

__all__ = ["Source", "check_unchanged", "fetched", "identity", "parse_source", "resolve", "run"]

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


def identity(source: Source, *, rehash: bool = False) -> dict[str, str]:
    """What a stage key is made of: equal for equal checkpoints, as far as file names and headers tell.

    Args:
        source: resolved.
        rehash: tell weight files apart by all their bytes, rather than by size, time and header.

    Returns:
        of the hub, its id and commit; of a folder, its name and each file that a build needs → what tells it from
        another.

    Raises:
        BuildError: the folder is no checkpoint, see `builder.checkpoint.load`.
    """
    if source.folder is None:
        return {"repository": str(source.repo), "revision": str(source.revision)}
    folder = source.folder
    told = (*open_checkpoint(folder).files, *_notices(folder))
    marks = {file: mark(folder / file, rehash) for file in told}
    return {"checkpoint name": source.name, **marks}


def run(build: Build, out: Path) -> dict[str, Any]:
    """Fetch `build.source`, and write `checkpoint.json` into `out`.

    Returns:
        for the record: the folder, the number of files, their bytes, the command that pins this state; of a
        download, that command as a `report`.

    Raises:
        DownloadError: the hub failed, or sent other bytes than it names.
        BuildError: the checkpoint is refused, see `builder.checkpoint.load`.
    """
    source = build.source
    if source.folder is None:
        folder, remotes = download(source)
        digests = _digests(folder, remotes)
        _check_bytes(folder, remotes, digests)
        checkpoint = open_checkpoint(folder, name=source.name, revision=source.revision)
    else:
        checkpoint = open_checkpoint(source.folder.absolute(), name=source.name)
        read = [file for file in checkpoint.files if build.rehash or not file.endswith(WEIGHTS)]
        digests = _digests(checkpoint.folder, read)
    facts = {
        "folder": str(checkpoint.folder),
        "name": checkpoint.name,
        "revision": checkpoint.revision,
        "command": source.command,
    }
    stats = {file: (checkpoint.folder / file).stat() for file in checkpoint.files}
    files = {
        file: {"size": stat.st_size, "time": stat.st_mtime_ns, "sha256": digests.get(file, (0, None))[1]}
        for file, stat in stats.items()
    }
    for file in _notices(checkpoint.folder):
        (out / NOTICES).mkdir(exist_ok=True)
        shutil.copyfile(checkpoint.folder / file, out / NOTICES / file)
    text = json.dumps({**facts, "files": files}, indent=2, sort_keys=True)
    (out / FETCHED).write_text(text + "\n", encoding="utf-8")
    report = {} if source.repo is None else {"report": f"pinned: {source.command}"}
    return {**facts, "files": len(files), "bytes": sum(stat.st_size for stat in stats.values()), **report}


def fetched(out: Path, moved: Path | None = None) -> Checkpoint:
    """The checkpoint that an earlier `run` fetched, opened again.

    Args:
        moved: the folder where the same files lie by now; None for where they were.

    Raises:
        CheckpointError: `run` did not end, or its folder is gone.
    """
    record = read_json(out / FETCHED)
    folder = moved or Path(record["folder"])
    if not folder.is_dir():
        raise CheckpointError(
            f"the checkpoint that was fetched is gone from {folder}",
            expected=f"the folder that {out / FETCHED} names",
            found="no such folder",
            next=f"{record['command']} --force fetch",
        )
    return open_checkpoint(folder, name=record["name"], revision=record["revision"])


def check_unchanged(build: Build, shards: Mapping[str, str]) -> None:
    """That the weights are those that `run` saw.

    Args:
        shards: SHA-256 (hex) of each safetensors file, as it has been read since.

    Raises:
        CheckpointError: a file has other bytes, or, where `run` did not read it, another size or time.
    """
    known = read_json(build.folder("fetch") / FETCHED)["files"]
    for file, digest in shards.items():
        stat = (build.checkpoint.folder / file).stat()
        found = {"size": stat.st_size, "time": stat.st_mtime_ns, "sha256": digest}
        # A clone has new times; where all bytes were read, they tell nothing.
        telling = ("size", "time") if known[file]["sha256"] is None else ("size", "sha256")
        if differ := [kind for kind in telling if known[file][kind] != found[kind]]:
            raise CheckpointError(
                f"{build.checkpoint.folder / file} changed since it was fetched",
                expected=", ".join(f"{kind} {known[file][kind]}" for kind in differ),
                found=", ".join(f"{kind} {found[kind]}" for kind in differ),
                next="let whatever writes it finish, then run the same command again",
            )


def _notices(folder: Path) -> tuple[str, ...]:
    """Names of licences, notices and the card in `folder`; none that is larger than a text."""
    names = (path.name for path in folder.iterdir() if path.is_file() and path.stat().st_size <= MAX_TEXT)
    return notice_files(names)


def mark(path: Path, rehash: bool = False) -> str:
    """What tells a checkpoint's file from another: SHA-256; of weights, unless `rehash`, size, time and header."""
    if rehash or path.suffix != WEIGHTS:
        return f"sha256 {_sha256(path)}"
    stat = path.stat()
    with path.open("rb") as file:
        header = file.read(8)
        header += file.read(int.from_bytes(header, "little"))
    return f"{stat.st_size} bytes, time {stat.st_mtime_ns}, header {hashlib.sha256(header).hexdigest()}"


def beside(source: Source, name: str) -> str:
    """What tells the cases in the folder `name` beside a local checkpoint's from others: a digest of all its files."""
    folder = None if source.folder is None else source.folder.resolve().parent / name
    if folder is None or not (folder / "cases.jsonl").is_file():
        return "none"
    told = [f"{file.name} {mark(file)}" for file in sorted(folder.iterdir()) if file.is_file()]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def _digests(folder: Path, files: Iterable[str]) -> dict[str, tuple[int, str]]:
    """File → size in bytes and SHA-256 (hex)."""
    return {file: ((folder / file).stat().st_size, _sha256(folder / file)) for file in files}


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


def _check_bytes(folder: Path, remotes: Mapping[str, Remote], digests: Mapping[str, tuple[int, str]]) -> None:
    """That what arrived (or lay in the cache) is what the hub names."""
    for file, remote in remotes.items():
        size, sha256 = digests[file]
        expected = {"bytes": remote.size, "sha256": remote.sha256, "git blob": remote.git}
        found = {
            "bytes": size,
            "sha256": sha256,
            "git blob": _git_blob(folder / file) if remote.git else None,
        }
        for kind, value in expected.items():
            if value is not None and found[kind] != value:
                raise DownloadError(
                    f"{file} is not what the hub says it is",
                    expected=f"{kind} {value}",
                    found=f"{kind} {found[kind]}",
                    next=f"remove {shlex.quote(str((folder / file).resolve()))} and build again",
                )


def _git_blob(path: Path) -> str:
    content = path.read_bytes()
    # Git's name for a file, not a safeguard: SHA-1 is what the hub has for files outside LFS.
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
