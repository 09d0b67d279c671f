"""Run a function in a process of its own, and end it where it takes too much time or memory.

In: a function of this package, its arguments, bounds. Out: what it returns, or the error that it raises.
Guaranteed: the process is gone when `bounded` returns; what it takes beyond the bounds is what fits between two looks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import psutil

from builder.util.errors import BuildError

T = TypeVar("T")

_LOOK = 0.01  # seconds
# Of the clock, for each second of work: a machine that is busy is no reason to end what works.
_PATIENCE = 60


class BoundsError(Exception):
    """The function took too long, too much memory, or ended its process; says which."""


def bounded(function: Callable[..., T], *arguments: Any, seconds: float, memory: int) -> T:
    """`function(*arguments)`.

    Args:
        function: of a module, so that the other process can import it; raises nothing but `BuildError`s.
        arguments: what can be pickled.
        seconds: of work of its process (CPU time), what it imports included.
        memory: resident bytes of its process, likewise.

    Raises:
        BuildError: whatever the function raises.
        BoundsError: a bound was reached, or the process ended without an answer.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        answer = _received(ours, psutil.Process(process.pid), seconds, memory)
    finally:
        process.kill()
        process.join()
        ours.close()
    if isinstance(answer, BuildError):
        raise answer
    result: T = answer
    return result


def _received(ours: Connection, process: psutil.Process, seconds: float, memory: int) -> Any:
    end = time.monotonic() + _PATIENCE * seconds
    while not ours.poll(_LOOK):
        try:
            if process.memory_info().rss > memory:
                raise BoundsError(f"it takes more than {memory // 2**20} MB of memory")
            worked = process.cpu_times()
        except psutil.NoSuchProcess:
            break
        if worked.user + worked.system > seconds or time.monotonic() > end:
            raise BoundsError("it does not come to an end")
    try:
        return ours.recv()
    except (EOFError, OSError) as error:
        raise BoundsError("its process ended without an answer") from error


def _answer(theirs: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        theirs.send(function(*arguments))
    except BuildError as error:
        theirs.send(error)
