"""How a command ends: with an exit code a kind of error, and in words.

In: what a command does, or what it has to say. Out: stderr, one JSON object on stdout where that was asked for, and
`typer.Exit`. Guaranteed: a user's error never shows a traceback.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer

from builder.util.errors import BuildError, MissingPackageError

INTERRUPTED, BUG = 130, 70


@contextmanager
def reported(as_json: bool) -> Iterator[None]:
    """Turn what goes wrong into words and an exit code."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        print("interrupted; what is whole stays, and the same command goes on from there", file=sys.stderr)
        if as_json:
            emit({"ok": False, "error": "KeyboardInterrupt", "exit_code": INTERRUPTED, "what": "interrupted"})
        raise typer.Exit(INTERRUPTED) from None
    except BuildError as error:
        raise _said(error, as_json) from None
    except Exception as error:
        absent = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
        if absent and absent.partition(".")[0] not in ("builder", "patches"):
            missing = MissingPackageError(
                f"this command needs {absent}, which is not installed",
                next='pip install "qwen3vl-onnx[build]"',
            )
            raise _said(missing, as_json) from None
        traceback.print_exc()
        print("this is a bug: please report it with the lines above", file=sys.stderr)
        if as_json:
            emit({"ok": False, "error": type(error).__name__, "exit_code": BUG, "what": str(error)})
        raise typer.Exit(BUG) from None


def _said(error: BuildError, as_json: bool) -> typer.Exit:
    print(f"error: {error}", file=sys.stderr)
    if as_json:
        emit({"ok": False, **error.as_dict()})
    return typer.Exit(error.exit_code)


def emit(payload: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(payload, indent=2))
