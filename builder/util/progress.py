"""Report the progress of long steps to a display that the command line installs.

A stage runs `with progress("export", total=6) as advance: … advance()`; without a display (`shown_by`), nothing is
printed or imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Protocol


class Advance(Protocol):
    """Report `steps` more steps as done."""

    def __call__(self, steps: int = 1) -> None: ...


Show = Callable[[str, int | None], AbstractContextManager[Advance]]


@contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Advance]:
    """Report a step of work to the display, if there is one.

    Args:
        label: of the step, with the unit of `total`.
        total: number of steps; None if not known.
    """
    show = _SHOW.get()
    if show is None:
        yield _ignore
    else:
        with show(label, total) as advance:
            yield advance


@contextmanager
def shown_by(show: Show) -> Iterator[None]:
    """Use `show` as the display inside the `with` block."""
    token = _SHOW.set(show)
    try:
        yield
    finally:
        _SHOW.reset(token)


def _ignore(steps: int = 1) -> None:
    return


_SHOW: ContextVar[Show | None] = ContextVar("show", default=None)
