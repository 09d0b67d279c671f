"""Run a function in a process with limits on time and memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import psutil

from builder.util.errors import BuildError

T = TypeVar("T")

_POLL = 0.01  # seconds
# Wall-clock seconds allowed per CPU second: a busy machine must not end a process that makes progress.
_PATIENCE = 60


class LimitError(Exception):
    """The function took too much time or memory, or its process ended without a result."""


def run_limited(function: Callable[..., T], *arguments: Any, seconds: float, memory: int) -> T:
    """Return `function(*arguments)`, computed in a process that has ended when this returns.

    Args:
        function: at module level, so that the process can import it; raises only `BuildError`s.
        arguments: picklable.
        seconds: of CPU time of the process, including imports.
        memory: resident bytes of the process, including imports.

    Raises:
        BuildError: the error that the function raised.
        LimitError: a limit was reached (checked every 10 ms), or the process ended without a result.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        answer = _receive(ours, psutil.Process(process.pid), seconds, memory)
    finally:
        process.kill()
        process.join()
        ours.close()
    if isinstance(answer, BuildError):
        raise answer
    result: T = answer
    return result


def _receive(ours: Connection, process: psutil.Process, seconds: float, memory: int) -> Any:
    end = time.monotonic() + _PATIENCE * seconds
    while not ours.poll(_POLL):
        try:
            if process.memory_info().rss > memory:
                raise LimitError(f"it takes more than {memory // 2**20} MB of memory")
            worked = process.cpu_times()
        except psutil.NoSuchProcess:
            break
        if worked.user + worked.system > seconds or time.monotonic() > end:
            raise LimitError("it does not come to an end")
    try:
        return ours.recv()
    except (EOFError, OSError) as error:
        raise LimitError("its process ended without a result") from error


def _answer(theirs: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        theirs.send(function(*arguments))
    except BuildError as error:
        theirs.send(error)
