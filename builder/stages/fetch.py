"""The stage `fetch`: the checkpoint's files, on this disk, whole, and what each is.

In: a resolved `Source`. Out: `checkpoint.json` with the folder, the revision, and what tells every file that a
build needs from another; `notices/`: what the checkpoint says of its license. Guaranteed: a local folder is used in
place and never written to, and its weights are not read: `builder.stages.quantize` takes their SHA-256 as they pass; a
download is of one commit, and its bytes are those that the hub names; the checkpoint opens (see
`builder.checkpoint.load`).
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.checkpoint.fingerprint import FETCHED, NOTICES, WEIGHTS, _notices, _sha256
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
        for the record: the folder, the number of files, their bytes, the command that pins this state; of a
        download, that command as a `report`.

    Raises:
        DownloadError: the hub failed, or sent other bytes than it names.
        CheckpointError: a file changed since the checkpoint was opened.
        BuildError: the checkpoint is refused, see `builder.checkpoint.load`.
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
        # A local folder was opened for the plan; its tensors must be of the bytes that are recorded here.
        found = dict(zip(("size", "time"), now.get(file, ("none", "none")), strict=True))
        _check_same(checkpoint.folder / file, "opened", files[file], found)
        files[file]["sha256"] = digests.get(file, (0, None))[1]
    for file in _notices(checkpoint.folder):
        (out / NOTICES).mkdir(exist_ok=True)
        shutil.copyfile(checkpoint.folder / file, out / NOTICES / file)
    text = json.dumps({**facts, "files": files}, indent=2, sort_keys=True)
    (out / FETCHED).write_text(text + "\n", encoding="utf-8")
    report = {} if source.repo is None else {"report": f"pinned: {source.command}"}
    return {**facts, "files": len(files), "bytes": sum(size for size, _ in now.values()), **report}


def check_unchanged(build: Build, shards: Mapping[str, str]) -> None:
    """That the weights are those that `run` saw.

    Args:
        shards: SHA-256 (hex) of each safetensors file, as it has been read since.

    Raises:
        CheckpointError: a file has other bytes, or, where `run` did not read it, another size or time.
    """
    known = read_json(build.folder("fetch") / FETCHED)["files"]
    for file, digest in shards.items():
        path = build.checkpoint.folder / file
        stat = path.stat()
        found = {"size": stat.st_size, "time": stat.st_mtime_ns, "sha256": digest}
        # A clone has new times; where all bytes were read, they tell nothing.
        telling = ("size", "time") if known[file]["sha256"] is None else ("size", "sha256")
        _check_same(path, "fetched", {kind: known[file][kind] for kind in telling}, found)


def _check_same(path: Path, since: str, known: Mapping[str, object], found: Mapping[str, object]) -> None:
    if differ := [kind for kind in known if known[kind] != found[kind]]:
        raise CheckpointError(
            f"{path} changed since it was {since}",
            expected=", ".join(f"{kind} {known[kind]}" for kind in differ),
            found=", ".join(f"{kind} {found[kind]}" for kind in differ),
            next="let whatever writes it finish, then run the same command again",
        )


def _digests(folder: Path, files: Iterable[str]) -> dict[str, tuple[int, str]]:
    """File → size in bytes and SHA-256 (hex)."""
    return {file: ((folder / file).stat().st_size, _sha256(folder / file)) for file in files}


def _check_bytes(folder: Path, remotes: Mapping[str, Remote], digests: Mapping[str, tuple[int, str]]) -> None:
    """That what arrived (or lay in the cache) is what the hub names."""
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
                    f"{file} is not what the hub says it is",
                    expected=f"{kind} {value}",
                    found=f"{kind} {found[kind]}",
                    next=f"remove {shlex.quote(str((folder / file).resolve()))} and build again",
                )
