"""`pack`: the same bytes in any folder, for any user; whole or absent; what was changed is not packed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from builder.bundle.check import check
from builder.bundle.pack import pack
from builder.cli.app import app
from builder.util.errors import BundleError, OutputError
from tests.helpers.bundles import DATA, edit_graph, relisted, small_bundle
from tests.helpers.processes import python

MEMORY = 250 * 10**6  # bytes; what is packed below is larger


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_it_prints_what_sha256sum_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("pack", small_bundle(tmp_path / "genai"))
    assert result.exit_code == 0, result.output
    lines = [line.split("  ") for line in result.stdout.splitlines()]
    assert [name for _, name in lines] == ["Tiny-fp32-genai.tar", "Tiny-fp32-genai-evidence.tar"]
    assert [sha256 for sha256, _ in lines] == [digest(tmp_path / name) for _, name in lines]
    payload = json.loads(invoke("pack", tmp_path / "genai", "--output", "again.tar", "--json").stdout)
    assert [one["sha256"] for one in payload["archives"]] == [sha256 for sha256, _ in lines]
    assert [one["size"] for one in payload["archives"]] == [(tmp_path / name).stat().st_size for _, name in lines]


def test_two_packs_of_different_folders_and_times_are_one(tmp_path: Path) -> None:
    first = small_bundle(tmp_path / "genai")
    second = Path(shutil.copytree(first, tmp_path / "else" / "where"))
    for path in second.rglob("*"):
        os.utime(path, (1, 2))
        path.chmod(0o777 if path.is_dir() else 0o600)
    if os.geteuid() == 0:
        for path in second.rglob("*"):
            os.chown(path, 12345, 54321)
    (second / "evidence" / "report.md").write_text("measured again")
    one, evidence = pack(first, tmp_path / "a.tar")
    other, measured = pack(second, tmp_path / "deep" / "b.tar")
    assert one.sha256 == other.sha256 == digest(tmp_path / "a.tar")
    assert evidence.sha256 != measured.sha256


@pytest.mark.seconds
def test_another_umask_and_locale_change_nothing(tmp_path: Path) -> None:
    folder = small_bundle(tmp_path / "genai")
    here, _ = pack(folder, tmp_path / "a.tar")
    program = "import os, sys; os.umask(0o077); from builder.cli.app import app; app(sys.argv[1:])"
    settings = {"LC_ALL": "C", "TZ": "Asia/Tokyo", "SOURCE_DATE_EPOCH": "1", "PYTHONHASHSEED": "7"}
    done = python("-c", program, "pack", folder, "--output", tmp_path / "b.tar", cwd=tmp_path, settings=settings)
    assert done.stdout.startswith(here.sha256), done.stderr


def test_what_is_unpacked_is_the_bundle(tmp_path: Path) -> None:
    folder = small_bundle(tmp_path / "genai")
    for one in pack(folder, tmp_path / "x.tar"):
        with tarfile.open(one.path) as archive:
            for entry in archive:
                assert (entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname) == (0, 0, 0, "", "")
                assert (entry.mode, entry.isfile()) == (0o644, True)
            assert archive.getnames() == sorted(archive.getnames())
            archive.extractall(tmp_path / "out", filter="data")
    there = tmp_path / "out" / "Tiny-fp32-genai"
    assert check(there).manifest == check(folder).manifest
    files = {path.relative_to(folder) for path in folder.rglob("*")}
    assert {path.relative_to(there) for path in there.rglob("*")} == files
    listed = subprocess.run(["tar", "-tf", tmp_path / "x.tar"], capture_output=True, text=True, check=True)
    assert "Tiny-fp32-genai/manifest.json" in listed.stdout.splitlines()


def test_what_was_changed_is_not_packed_and_leaves_nothing(tmp_path: Path) -> None:
    folder = small_bundle(tmp_path / "genai")
    data = bytearray((folder / DATA).read_bytes())
    data[-1] ^= 1
    (folder / DATA).write_bytes(data)
    output = tmp_path / "out" / "x.tar"
    with pytest.raises(BundleError, match=DATA):
        pack(folder, output)
    assert not list(output.parent.iterdir())
    output.write_bytes(b"an earlier one")
    with pytest.raises(BundleError):
        pack(folder, output)
    assert output.read_bytes() == b"an earlier one"

    other = small_bundle(tmp_path / "other")
    edit_graph(other, lambda model: setattr(model.graph.node[2], "op_type", "Sub"))
    relisted(other, graphs=False)
    with pytest.raises(BundleError, match="operators"):
        pack(other, output)


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_bundle(tmp_path / "genai")

    def full(*given: object, **named: object) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(OutputError, match=r"x\.tar") as raised:
        pack(folder, tmp_path / "out" / "x.tar")
    assert raised.value.found == "No space left on device"
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    folder = small_bundle(tmp_path / "genai")
    (tmp_path / "file").write_text("x")
    assert invoke("pack", folder, "--output", tmp_path / "file" / "x.tar").exit_code == OutputError.exit_code


def test_a_link_in_the_way_is_replaced_and_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    for name in ("x.tar", "x.tar.part"):
        (tmp_path / name).symlink_to(outside)
    pack(small_bundle(tmp_path / "genai"), tmp_path / "x.tar")
    assert outside.read_text() == "mine"
    assert not (tmp_path / "x.tar").is_symlink()


def grown(folder: Path, size: int) -> Path:
    """With a data file of that many bytes behind the weight, which take no room on the disk."""
    os.truncate(folder / DATA, size)
    with (folder / DATA).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    content = json.loads((folder / "manifest.json").read_text())
    content["files"][DATA] = {"size": size, "sha256": sha256}
    (folder / "manifest.json").write_text(json.dumps(content))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("size", [400 * 10**6, 2**31 + 12345, 2**33 + 1])
def test_memory_does_not_grow_with_the_bundle(tmp_path: Path, size: int) -> None:
    """The last is past 8 GB, where tar needs another header. The archive goes to a device that keeps nothing."""
    folder = grown(small_bundle(tmp_path / "genai"), size)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from builder.bundle.inventory import open_content\n"
        "from builder.util.peak_memory import peak_rss\n"
        "from builder.bundle.pack import _Hashed, _archive\n"
        "content = open_content(Path(sys.argv[1]))\n"
        "with open('/dev/null', 'wb') as file:\n"
        "    target = _Hashed(file)\n"
        "    _archive(content, content.shipped, target)\n"
        "print(target.digest.hexdigest(), peak_rss())\n"
    )
    done = python("-c", program, folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) < MEMORY
