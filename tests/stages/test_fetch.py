"""Values of CHECKPOINT, and the stage `fetch` on a local folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from builder.checkpoint.fingerprint import folder_fingerprint, open_fetched, resolve
from builder.checkpoint.load import open_checkpoint
from builder.checkpoint.source import Source, parse_source
from builder.stages.engine.build import Build
from builder.stages.fetch import check_unchanged
from builder.targets.recipe_file import load_recipe
from builder.util.errors import CheckpointError
from tests.helpers.fetching import SHARD, fetch_into, sha256


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The stage's output folder."""
    return tmp_path / "1-fetch"


def fingerprint(folder: Path, *, rehash: bool = False) -> dict[str, str]:
    return folder_fingerprint(open_checkpoint(folder), rehash=rehash)


# What CHECKPOINT may be


def test_source_is_a_folder_that_exists(sharded: Path) -> None:
    source = parse_source(str(sharded))
    assert (source.folder, source.repo, source.name) == (sharded, None, "copy")
    assert str(sharded) in source.command


@pytest.mark.parametrize(
    ("text", "repo", "revision", "name"),
    [
        ("Qwen/Qwen3-VL-4B-Instruct", "Qwen/Qwen3-VL-4B-Instruct", None, "Qwen3-VL-4B-Instruct"),
        ("a/b@main", "a/b", "main", "b"),
        ("Org/Name@refs/pr/3", "Org/Name", "refs/pr/3", "Name"),
    ],
)
def test_source_is_a_hub_id(text: str, repo: str, revision: str | None, name: str) -> None:
    assert parse_source(text) == Source(name=name, repo=repo, revision=revision)
    assert parse_source(text).command.endswith(text)


@pytest.mark.parametrize(
    "text", ["./nope", "", "nope", "/no/such/folder", "a/b/c", "../x", "a/b@", "a/b--c", "a/b.git"]
)
def test_neither_folder_nor_hub_id(text: str) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        parse_source(text)


# A local folder


@pytest.mark.parametrize("rehash", [False, True])
def test_local_folder_is_used_in_place(sharded: Path, out: Path, rehash: bool) -> None:
    """Weights are hashed only if requested."""
    before = {path: path.stat().st_mtime_ns for path in sharded.iterdir()}
    facts = fetch_into(parse_source(str(sharded)), out, rehash=rehash)
    checkpoint = open_fetched(out)
    assert checkpoint.folder == sharded
    assert {path: path.stat().st_mtime_ns for path in sharded.iterdir()} == before
    record = json.loads((out / "checkpoint.json").read_text())
    assert set(record["files"]) == set(checkpoint.files)
    assert SHARD in record["files"]
    for file, entry in record["files"].items():
        assert entry == {
            "size": (sharded / file).stat().st_size,
            "time": (sharded / file).stat().st_mtime_ns,
            "sha256": sha256(sharded / file) if rehash or not file.endswith(".safetensors") else None,
        }
    assert facts["files"] == len(record["files"])
    assert facts["bytes"] == sum((sharded / file).stat().st_size for file in checkpoint.files)


def test_a_removed_folder_is_an_error_with_advice(sharded: Path, out: Path) -> None:
    fetch_into(parse_source(str(sharded)), out)
    shutil.rmtree(sharded)
    with pytest.raises(CheckpointError, match="gone") as caught:
        open_fetched(out)
    assert "--force fetch" in str(caught.value.next)


def test_a_folder_that_was_moved_is_the_same_checkpoint(sharded: Path, out: Path, tmp_path: Path) -> None:
    before = Build(parse_source(str(sharded)), load_recipe(), out.parent)
    fetch_into(before.source, out)
    known = fingerprint(sharded)
    (tmp_path / "elsewhere").mkdir()
    moved = Path(shutil.move(sharded, tmp_path / "elsewhere" / sharded.name))
    after = replace(before, source=parse_source(str(moved)))
    assert fingerprint(moved) == known
    assert after.checkpoint.folder == moved


def test_a_folder_of_another_name_is_another_checkpoint(sharded: Path, tmp_path: Path) -> None:
    """The name is in the manifest."""
    first = fingerprint(sharded)
    renamed = fingerprint(Path(shutil.move(sharded, tmp_path / "renamed")))
    assert {name for name in first if first[name] != renamed[name]} == {"checkpoint name"}


def test_resolve_leaves_a_folder_alone(sharded: Path) -> None:
    assert resolve(parse_source(str(sharded))) == parse_source(str(sharded))


def flip_last_byte(path: Path) -> None:
    """Change bytes, but not size, time and header."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_fingerprints_distinguish_states_of_a_folder(sharded: Path) -> None:
    first = fingerprint(sharded)
    assert fingerprint(sharded) == first
    assert not any(str(sharded) in mark for mark in first.values())
    (sharded / "generation_config.json").write_text("{}")
    changed = fingerprint(sharded)
    assert [name for name in first if changed[name] != first[name]] == ["generation_config.json"]
    stat = (sharded / SHARD).stat()
    os.utime(sharded / SHARD, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert [name for name in first if fingerprint(sharded)[name] != changed[name]] == [SHARD]


def test_rehash_sees_bytes_rather_than_times(sharded: Path) -> None:
    quick, full = fingerprint(sharded), fingerprint(sharded, rehash=True)
    assert full[SHARD] == f"sha256 {sha256(sharded / SHARD)}"
    os.utime(sharded / "config.json", ns=(1, 1))
    assert fingerprint(sharded, rehash=True) == full
    flip_last_byte(sharded / SHARD)
    assert fingerprint(sharded) == quick
    # Within one process a file of the same size and time is hashed once.
    code = (
        "import pathlib, sys; from builder.checkpoint.fingerprint import *; from builder.checkpoint.load import *; "
        "print(folder_fingerprint(open_checkpoint(pathlib.Path(sys.argv[1])), rehash=True)[sys.argv[2]])"
    )
    command = [sys.executable, "-c", code, str(sharded), SHARD]
    anew = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert anew == f"sha256 {sha256(sharded / SHARD)}" != full[SHARD]


# What has been read since


def read_since(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("rehash", [False, True])
def test_weights_that_stayed_as_they_were(sharded: Path, out: Path, rehash: bool) -> None:
    build = Build(parse_source(str(sharded)), load_recipe(), out.parent)
    fetch_into(build.source, out, rehash=rehash)
    check_unchanged(build, read_since(sharded))


def test_weights_of_another_clone_are_the_same_where_all_bytes_were_read(sharded: Path, out: Path) -> None:
    build = Build(parse_source(str(sharded)), load_recipe(), out.parent)
    fetch_into(build.source, out, rehash=True)
    for file in sharded.iterdir():
        os.utime(file, ns=(1, 1))
    check_unchanged(build, read_since(sharded))


def shorten(path: Path) -> None:
    os.truncate(path, 1000)
    os.utime(path, ns=(1, 1))


def rename_into(path: Path) -> None:
    """Another file with the same bytes and size, written later."""
    shutil.copyfile(path, path.with_name("other"))
    os.utime(path.with_name("other"), ns=(1, path.stat().st_mtime_ns + 1))
    os.replace(path.with_name("other"), path)


@pytest.mark.parametrize(
    ("rehash", "change", "differs"),
    [
        pytest.param(False, shorten, ["size", "time"], id="shorter"),
        pytest.param(False, lambda path: os.utime(path, ns=(1, 1)), ["time"], id="at another time"),
        pytest.param(False, rename_into, ["time"], id="replaced"),
        pytest.param(True, flip_last_byte, ["sha256"], id="other bytes of the same size and time"),
    ],
)
def test_changed_weights_are_reported_with_the_difference(
    sharded: Path, out: Path, rehash: bool, change: Callable[[Path], None], differs: list[str]
) -> None:
    build = Build(parse_source(str(sharded)), load_recipe(), out.parent)
    fetch_into(build.source, out, rehash=rehash)
    assert SHARD in build.checkpoint.files  # opened before it changes, as the stage that reads it has it
    before = sha256(sharded / SHARD)
    change(sharded / SHARD)
    with pytest.raises(CheckpointError, match=SHARD) as caught:
        check_unchanged(build, read_since(sharded))
    for side in (caught.value.expected, caught.value.found):
        assert [part.split()[0] for part in str(side).split(", ")] == differs
    if differs == ["sha256"]:
        assert caught.value.expected == f"sha256 {before}"
        assert caught.value.found == f"sha256 {sha256(sharded / SHARD)}"
    assert caught.value.next is not None
