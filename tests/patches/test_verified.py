"""verified.toml is written reproducibly, read strictly, and complete."""

from __future__ import annotations

from pathlib import Path

import pytest

import patches as own
from builder.util.errors import OutputError, PatchError
from patches import verified


def test_a_file_is_written_the_same_whatever_the_order(tmp_path: Path) -> None:
    rows = {"1.10.0": "0" * 12, "1.9.0": "1" * 12}
    backwards = dict(reversed(rows.items()))
    lines = {"1.9.0": {"m:b": "0" * 12, "m:a": "1" * 6}}
    verified.write(verified.Verified({"b": rows, "a": backwards}, lines), tmp_path / "one.toml")
    verified.write(verified.Verified({"a": rows, "b": backwards}, lines), tmp_path / "two.toml")
    assert (tmp_path / "one.toml").read_bytes() == (tmp_path / "two.toml").read_bytes()
    data = verified.read(tmp_path / "one.toml")
    assert data.releases("a") == ("1.9.0", "1.10.0")
    assert data.lines["1.9.0"]["m:a"] == "1" * 6
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one.toml", "two.toml"]


@pytest.mark.parametrize(
    "text",
    [
        "[digests",
        '[other]\n"1.0.0" = "a"',
        '[digests.a]\n"1.0.0" = "xyz"',
        '[digests.a]\nnewest = "012345678901"',
        "digests = 3",
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "verified.toml"
    file.write_text(text)
    with pytest.raises(PatchError, match=r"verified\.toml is damaged"):
        verified.read(file)


def test_a_file_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        verified.write(verified.Verified(), tmp_path / "absent" / "verified.toml")


@pytest.mark.torch
def test_the_recorded_file_covers_every_patch_and_is_written_the_same(tmp_path: Path) -> None:
    data = verified.read()
    assert set(data.digests) == {patch.name for patch in own.all_patches()}
    for patch in own.all_patches():
        assert len(data.releases(patch.name)) >= 2, f"{patch.name}: the newest release and an earlier release"
        for release in data.releases(patch.name):
            assert set(patch.functions) <= set(data.lines[release])
    verified.write(data, tmp_path / "again.toml")
    assert (tmp_path / "again.toml").read_bytes() == verified.FILE.read_bytes()
