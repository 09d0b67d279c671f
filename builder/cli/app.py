"""The command line, `qwen3vl-onnx`.

In: arguments. Out: results on stdout (a path, a table, an answer, or one JSON object), everything else on
stderr, and an exit code a kind of error (`builder.util.errors`). Guaranteed: nothing else in `builder` ends the
process; a user's error never shows a traceback; nothing heavy is imported before it is needed.
"""

from __future__ import annotations

from typing import Annotated

import typer

from builder.cli.build import build, explain
from builder.cli.bundle import check, diff, pack, publish, run, sign
from builder.cli.patches import patches
from builder.cli.recipe import sensitivity
from builder.cli.verify import golden, report, table, verify

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from builder.util import versions

        print("qwen3vl-onnx", versions.version("qwen3vl-onnx"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
    ] = False,
) -> None:
    """From a Qwen3-VL checkpoint to ONNX bundles that provably equal the model."""


# In the order of `--help`.
COMMANDS = (
    *(build, explain, run, patches, verify, golden, report, table),
    *(sensitivity, check, sign, pack, publish, diff),
)
for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """The console script."""
    app()
