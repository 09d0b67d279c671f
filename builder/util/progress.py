"""How far a long step has come, for whoever looks.

A stage says `with progress("export", total=6) as advance: … advance()`; what is done with it is up to the
command line, which calls `shown_by`. Guaranteed: without one, nothing is printed and nothing is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Protocol


class Advance(Protocol):
    """Tell that `steps` more are done (of the unit that `total` counts)."""

    def __call__(self, steps: int = 1) -> None: ...


Show = Callable[[str, int | None], AbstractContextManager[Advance]]


@contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Advance]:
    """A stretch of work of `total` steps (None: not known), shown where someone looks."""
    show = _SHOW.get()
    if show is None:
        yield _ignore
    else:
        with show(label, total) as advance:
            yield advance


@contextmanager
def shown_by(show: Show) -> Iterator[None]:
    """Have every `progress` inside shown by `show`."""
    token = _SHOW.set(show)
    try:
        yield
    finally:
        _SHOW.reset(token)


def _ignore(steps: int = 1) -> None:
    return


_SHOW: ContextVar[Show | None] = ContextVar("show", default=None)
