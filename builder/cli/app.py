"""The command line, `qwen3vl-onnx`.

Results (a path, a table, an answer, or one JSON object) go to stdout, everything else to stderr; each kind of error has
its exit code (`builder.util.errors`). Heavy packages are imported only by the commands that need them.
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


def _version(requested: bool) -> None:
    if requested:
        from builder.util import versions

        print("qwen3vl-onnx", versions.version("qwen3vl-onnx"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
    ] = False,
) -> None:
    """Convert Qwen3-VL checkpoints to ONNX bundles that provably equal the model."""


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
