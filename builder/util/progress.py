"""Report the progress of long steps to a display that the command line installs.

A stage runs `with progress("export", total=6) as advance: … advance()`; without a display (`use_display`), nothing is
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


Display = Callable[[str, int | None], AbstractContextManager[Advance]]


@contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Advance]:
    """Report a step of work to the display, if there is one.

    Args:
        label: of the step, with the unit of `total`.
        total: number of steps; None if not known.
    """
    display = _DISPLAY.get()
    if display is None:
        yield _ignore
    else:
        with display(label, total) as advance:
            yield advance


@contextmanager
def use_display(display: Display) -> Iterator[None]:
    """Send progress to `display` inside the `with` block."""
    token = _DISPLAY.set(display)
    try:
        yield
    finally:
        _DISPLAY.reset(token)


def _ignore(steps: int = 1) -> None:
    return


_DISPLAY: ContextVar[Display | None] = ContextVar("display", default=None)
