"""Source texts and digests of a toy upstream package."""

from __future__ import annotations

import shutil

import pytest

from builder.util.errors import MissingPackageError, PatchError
from patches import source
from patches.registry import digest, release
from tests.helpers.toy_upstream import FIRST, LAYER, PACKAGE, Toy, patch, toy

__all__ = ["toy"]


@pytest.fixture(autouse=True)
def first(toy: Toy) -> None:
    """Release 1.0.0, unless a test installs another."""
    toy.install("1.0.0", FIRST)


def test_digest_is_twelve_hex_digits_over_the_decorated_source() -> None:
    assert source.text(LAYER.target).splitlines()[:2] == ["@logged", "def forward(self, x, scale=2):"]
    value = digest(LAYER)
    assert len(value) == 12
    assert int(value, 16) >= 0


def test_digest_ignores_line_endings_and_code_elsewhere(toy: Toy) -> None:
    before = digest(LAYER)
    toy.install("1.0.1", FIRST.replace("\n", "\r\n"))
    assert digest(LAYER) == before
    toy.install("1.0.2", FIRST.replace("return x + 5", "return x + 6"))
    assert digest(LAYER) == before


def test_digest_covers_what_the_target_calls(toy: Toy) -> None:
    before = digest(LAYER)
    toy.install("1.0.1", FIRST.replace("return 1", "return 1.0"))
    assert digest(LAYER) != before


def test_digest_changes_when_an_absent_function_appears(toy: Toy) -> None:
    assert source.text(f"{PACKAGE}.model:Layer.later") == "absent"
    assert source.text(f"{PACKAGE}.gone:function") == "absent"
    before = digest(LAYER)
    later = "    def later(self):\n        return 0\n\n    @staticmethod\n"
    toy.install("1.0.1", FIRST.replace("    @staticmethod\n", later))
    assert digest(LAYER) != before


def test_digest_depends_on_names_and_order() -> None:
    first, second = LAYER.functions[:2]
    assert source.digest([first, second]) != source.digest([second, first])


def test_release_is_the_installed_distribution() -> None:
    assert release(LAYER) == "1.0.0"


def test_a_missing_package_is_named() -> None:
    with pytest.raises(MissingPackageError, match="no_such_upstream"):
        source.text("no_such_upstream.model:f")
    with pytest.raises(MissingPackageError, match="no_such_upstream"):
        release(patch(target="no_such_upstream.model:f"))


def test_an_import_error_inside_upstream_is_not_swallowed(toy: Toy) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        toy.install("1.0.1", "import no_such_dependency\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        source.text(f"{PACKAGE}.model:f")


def test_source_that_cannot_be_read_is_named(toy: Toy) -> None:
    shutil.rmtree(toy.folder / "site-1.0.0" / PACKAGE)
    with pytest.raises(PatchError, match=r"the source of toy_upstream\.model:Layer\.forward cannot be read"):
        digest(LAYER)
