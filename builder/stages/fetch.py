"""Stage 1: have the checkpoint's files on this disk, and record their identity in `checkpoint.json`.

Guarantees: a local folder is used in place and never written to; its weights are not read here, but hashed by
`builder.stages.quantize` as it reads them; a download is of one commit, with the hub's digests; the checkpoint opens
(`builder.checkpoint.load`). `notices/` has its license files.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.checkpoint.fingerprint import FETCHED, NOTICES, WEIGHTS, cached_sha256, notice_names
from builder.checkpoint.hub import Remote, download
from builder.checkpoint.load import file_states, open_checkpoint
from builder.util.errors import CheckpointError, DownloadError
from builder.util.files import git_blob
from builder.util.json_files import read_json

if TYPE_CHECKING:
    from builder.stages.engine.build import Build


def run(build: Build, out: Path) -> dict[str, Any]:
    """Fetch `build.source`, and write `checkpoint.json` into `out`.

    Returns:
        For the record: folder, number of files, bytes, and the command that pins this revision, also as `report`
        for a download.

    Raises:
        DownloadError: the hub failed, or the bytes differ from its digests.
        CheckpointError: a file changed since the checkpoint was opened.
        BuildError: the checkpoint is invalid, see `builder.checkpoint.load`.
    """
    source = build.source
    if source.folder is None:
        folder, remotes = download(source)
        digests = _digests(folder, remotes)
        _check_bytes(folder, remotes, digests)
        checkpoint = open_checkpoint(folder, name=source.name, revision=source.revision)
    else:
        checkpoint = build.checkpoint
        read = [file for file in checkpoint.files if build.rehash or not file.endswith(WEIGHTS)]
        digests = _digests(checkpoint.folder, read)
    facts = {
        "folder": str(checkpoint.folder),
        "name": checkpoint.name,
        "revision": checkpoint.revision,
        "command": source.command,
    }
    now = file_states(checkpoint.folder, checkpoint.files)
    files: dict[str, dict[str, object]] = {}
    for file, (size, time) in checkpoint.states.items():
        files[file] = {"size": size, "time": time}
        # A local folder was opened earlier: its tensors must come from the files recorded here.
        found = dict(zip(("size", "time"), now.get(file, ("none", "none")), strict=True))
        _check_same(checkpoint.folder / file, "opened", files[file], found)
        files[file]["sha256"] = digests.get(file, (0, None))[1]
    for file in notice_names(checkpoint.folder):
        (out / NOTICES).mkdir(exist_ok=True)
        shutil.copyfile(checkpoint.folder / file, out / NOTICES / file)
    text = json.dumps({**facts, "files": files}, indent=2, sort_keys=True)
    (out / FETCHED).write_text(text + "\n", encoding="utf-8")
    report = {} if source.repo is None else {"report": f"pinned: {source.command}"}
    return {**facts, "files": len(files), "bytes": sum(size for size, _ in now.values()), **report}


def check_unchanged(build: Build, shards: Mapping[str, str]) -> None:
    """Check that the weights have not changed since `run`.

    Args:
        shards: SHA-256 (hex) of each safetensors file, as read since.

    Raises:
        CheckpointError: a file's bytes changed or, where `run` did not read it, its size or time.
    """
    known = read_json(build.folder("fetch") / FETCHED)["files"]
    for file, digest in shards.items():
        path = build.checkpoint.folder / file
        stat = path.stat()
        found = {"size": stat.st_size, "time": stat.st_mtime_ns, "sha256": digest}
        # Times matter only where `run` did not read the bytes: a clone has new times.
        compared = ("size", "time") if known[file]["sha256"] is None else ("size", "sha256")
        _check_same(path, "fetched", {kind: known[file][kind] for kind in compared}, found)


def _check_same(path: Path, since: str, known: Mapping[str, object], found: Mapping[str, object]) -> None:
    if differ := [kind for kind in known if known[kind] != found[kind]]:
        raise CheckpointError(
            f"{path} changed since it was {since}",
            expected=", ".join(f"{kind} {known[kind]}" for kind in differ),
            found=", ".join(f"{kind} {found[kind]}" for kind in differ),
            next="let whatever writes it finish, then run the same command again",
        )


def _digests(folder: Path, files: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Map files to their size in bytes and SHA-256 (hex)."""
    return {file: ((folder / file).stat().st_size, cached_sha256(folder / file)) for file in files}


def _check_bytes(folder: Path, remotes: Mapping[str, Remote], digests: Mapping[str, tuple[int, str]]) -> None:
    """Compare downloaded or cached files with the hub's sizes and digests."""
    for file, remote in remotes.items():
        size, sha256 = digests[file]
        expected = {"bytes": remote.size, "sha256": remote.sha256, "git blob": remote.git}
        found = {
            "bytes": size,
            "sha256": sha256,
            "git blob": git_blob(folder / file) if remote.git else None,
        }
        for kind, value in expected.items():
            if value is not None and found[kind] != value:
                raise DownloadError(
                    f"{file} differs from the file at the hub",
                    expected=f"{kind} {value}",
                    found=f"{kind} {found[kind]}",
                    next=f"remove {shlex.quote(str((folder / file).resolve()))} and build again",
                )
