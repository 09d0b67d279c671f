"""Turn errors into messages on stderr, one JSON object on stdout with `--json`, and exit codes."""

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
    """Report an error of the body in words, and exit with its code; only a bug shows a traceback."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        print("interrupted; complete stages are kept, run the same command again to resume", file=sys.stderr)
        if as_json:
            emit({"ok": False, "error": "KeyboardInterrupt", "exit_code": INTERRUPTED, "what": "interrupted"})
        raise typer.Exit(INTERRUPTED) from None
    except BuildError as error:
        raise _reported(error, as_json) from None
    except Exception as error:
        absent = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
        if absent and absent.partition(".")[0] not in ("builder", "patches"):
            missing = MissingPackageError(
                f"this command needs {absent}, which is not installed",
                next='pip install "qwen3vl-onnx[build]"',
            )
            raise _reported(missing, as_json) from None
        traceback.print_exc()
        print("this is a bug: please report it with the traceback above", file=sys.stderr)
        if as_json:
            emit({"ok": False, "error": type(error).__name__, "exit_code": BUG, "what": str(error)})
        raise typer.Exit(BUG) from None


def _reported(error: BuildError, as_json: bool) -> typer.Exit:
    print(f"error: {error}", file=sys.stderr)
    if as_json:
        emit({"ok": False, **error.as_dict()})
    return typer.Exit(error.exit_code)


def emit(payload: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout."""
    print(json.dumps(payload, indent=2))
