"""The command `patches`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer

from builder.cli.arguments import Json
from builder.cli.exit_codes import emit, reported


def patches(
    diff: Annotated[bool, typer.Option("--diff", help="Print each patch as a diff of upstream's source.")] = False,
    record: Annotated[
        bool,
        typer.Option("--record", help="Rerun the equivalence check of every patch and record the installed release."),
    ] = False,
    as_json: Json = False,
) -> None:
    """List the patches of transformers, and whether the installed release is verified."""
    with reported(as_json):
        from builder.stages import patch

        recorded = [asdict(row) for row in patch.record()] if record else []
        rows = [asdict(row) for row in patch.status()]
        if diff:
            rows = [{**row, "diff": patch.diff_text(row["name"])} for row in rows]
        if as_json:
            emit({"ok": True, "patches": rows, "recorded": recorded})
            return
        for row in recorded:
            print(f"{row['name']}: checked on {row['release']}, {'recorded' if row['new'] else 'known before'}")
        for row in rows:
            print(row["diff"] if diff else _patch_text(row))


def _patch_text(row: Mapping[str, Any]) -> str:
    return "\n".join(
        [
            f"{row['name']}: {row['state']} ({row['release']}, source {row['digest'] or 'not found'})",
            f"  target       {row['target']}",
            f"  why          {row['why']}",
            f"  remove when  {row['remove_when']}",
            f"  verified on  {', '.join(row['verified']) or 'none'}",
        ]
    )
