"""docs/architecture.md against the tree: its rooms, and every path and name that it mentions."""

from __future__ import annotations

import re

import pytest

from tests.helpers.processes import ROOT
from tests.helpers.rooms import FILES, ROOMS

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PATHS = sorted(set(re.findall(r"(?:builder|tests|patches|docs)/[\w/-]*(?:\.\w+)?", PAGE)))


def test_it_lists_the_rooms_from_top_to_bottom() -> None:
    assert re.findall(r"^\| `(\w+)/` \|", PAGE, re.MULTILINE) == list(ROOMS)


@pytest.mark.parametrize("path", PATHS)
def test_what_it_names_is_there(path: str) -> None:
    assert (ROOT / path).exists()


def test_it_names_the_folders_of_each_room() -> None:
    inner = {name.split("/")[2] for name in FILES if name.startswith("builder/") and name.count("/") >= 3}
    assert inner
    assert not {folder for folder in inner if f"`{folder}/`" not in PAGE}


def test_it_fits_one_page() -> None:
    assert len(PATHS) > 30
    assert len(PAGE.splitlines()) <= 90
