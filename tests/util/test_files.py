"""atomic_write leaves the old file or the new file, whatever fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.util.files import atomic_write, write_text


def test_a_hard_link_to_the_old_file_keeps_the_old_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    write_text(tmp_path / "a", "new\n")
    assert ((tmp_path / "a").read_bytes(), (tmp_path / "b").read_text()) == (b"new\n", "old")


def test_an_error_keeps_the_old_file_and_removes_the_part(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def interrupted() -> None:
        with atomic_write(tmp_path / "a") as part:
            part.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


def test_a_symbolic_link_in_the_place_of_the_part_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "a.part").symlink_to(tmp_path / "elsewhere")
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "elsewhere").read_text() == "kept"
    assert not (tmp_path / "a").is_symlink()
