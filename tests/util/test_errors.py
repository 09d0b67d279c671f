"""Every kind of error has an exit code of its own and names a next step."""

from __future__ import annotations

import pytest

from builder.util.errors import BuildError

KINDS = BuildError.__subclasses__()


def test_exit_codes_are_distinct() -> None:
    codes = [BuildError.exit_code, *(kind.exit_code for kind in KINDS)]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.__name__))
def test_every_kind_names_a_next_step(kind: type[BuildError]) -> None:
    assert kind("x").next == kind.default_next
    assert kind("x").next
    assert kind("x", next="do this").next == "do this"
