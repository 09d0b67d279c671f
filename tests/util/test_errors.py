"""The error vocabulary: every kind has an exit code of its own and always says what to do next."""

from __future__ import annotations

import pytest

from builder.util.errors import BuildError

KINDS = BuildError.__subclasses__()


def test_exit_codes_are_all_different() -> None:
    codes = [BuildError.exit_code, *(kind.exit_code for kind in KINDS)]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.__name__))
def test_every_kind_says_what_to_do_next(kind: type[BuildError]) -> None:
    assert kind("x").next == kind.otherwise
    assert kind("x").next
    assert kind("x", next="do this").next == "do this"
