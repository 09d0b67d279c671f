"""The commands that compare bundles and show the results: `verify`, `golden`, `report`, `table`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from builder.cli.arguments import Bundle, Cases, Checkpoint, Json, Memory
from builder.cli.exit_codes import emit, reported
from builder.util.errors import BundleError, VerificationError

if TYPE_CHECKING:
    from builder.checkpoint.load import Checkpoint as Opened


def verify(
    bundle: Bundle,
    reference: Annotated[
        str | None, typer.Option(help="The checkpoint to compare with: a folder or a hub id.", show_default=False)
    ] = None,
    golden: Annotated[
        Path | None,
        typer.Option(help="Compare with a file recorded by `golden`, without torch.", show_default=False),
    ] = None,
    cases: Cases = None,
    memory: Memory = None,
    store: Annotated[
        Path | None,
        typer.Option(help="Cache PyTorch's outputs in this folder.", show_default=False),
    ] = None,
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test", help="Break copies of the bundle, and require every mutant to be caught at its place."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare a bundle with PyTorch; exits with 0 only if every gate passes."""
    with reported(as_json):
        from builder.stages.engine.prepare import reference_checkpoint
        from builder.util.console_table import show
        from builder.verify.report.console import renderables

        if self_test and (reference is None or golden is not None or cases):
            raise typer.BadParameter("needs --reference, without --golden or --cases", param_hint="--self-test")
        if golden is not None and (memory is not None or store is not None):
            raise typer.BadParameter("cannot be combined with --memory or --store", param_hint="--golden")
        checkpoint = reference_checkpoint(reference) if reference else None
        if self_test and checkpoint is not None:
            _test_itself(bundle, checkpoint, memory, store, as_json)
            return
        evidence = bundle / "evidence"
        if golden is not None:
            from builder.verify.golden.verify import PART, failed, verify_bundle_golden

            evidence /= PART
            report = verify_bundle_golden(bundle, golden, cases or [], checkpoint)
        elif checkpoint is not None:
            from builder.verify.whole import failed, verify_bundle

            report = verify_bundle(bundle, checkpoint, memory, store, cases or [])
        else:
            raise typer.BadParameter("give the checkpoint, or --golden FILE", param_hint="--reference")
        if as_json:
            emit({**report.as_dict(), "ok": report.ok})
            raise typer.Exit(0 if report.ok else VerificationError.exit_code)
        show(*renderables(report))
        if not report.ok:
            raise failed(report, evidence)


def golden(
    output: Annotated[Path, typer.Option(help="File to write.")],
    checkpoint: Checkpoint = None,
    cases: Cases = None,
    memory: Memory = None,
    as_json: Json = False,
) -> None:
    """Record PyTorch's outputs for every case in one file, for `verify --golden`."""
    with reported(as_json):
        from builder.stages.engine.prepare import reference_checkpoint
        from builder.verify.golden.record import golden_of

        made = golden_of(reference_checkpoint(checkpoint), output, cases or [], memory)
        if as_json:
            emit({"ok": True, "golden": str(output), "checkpoint": made.checkpoint.name, "cases": len(made.cases)})
        else:
            print(output)


def report(
    bundle: Bundle,
    html: Annotated[Path | None, typer.Option(help="HTML page to write.", show_default=False)] = None,
    junit: Annotated[Path | None, typer.Option(help="JUnit XML file to write.", show_default=False)] = None,
    markdown: Annotated[Path | None, typer.Option(help="Markdown file to write.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Render a bundle's last verification again, by default in every format into its evidence/; compares nothing."""
    with reported(as_json):
        from builder.verify.report.write import render

        asked = {"report.html": html, "junit.xml": junit, "report.md": markdown}
        found, files = render(bundle, {name: path for name, path in asked.items() if path is not None})
        if as_json:
            emit({**found.as_dict(), "ok": found.ok, "files": [str(path) for path in files]})
            return
        for path in files:
            print(path)


def _test_itself(bundle: Path, checkpoint: Opened, memory: int | None, store: Path | None, as_json: bool) -> None:
    from builder.util.console_table import show
    from builder.verify.report.write import render
    from builder.verify.self_test.run import failed, self_test

    done = self_test(bundle, checkpoint, memory, store)
    try:
        render(bundle, {})  # with the catch table
    except BundleError as error:
        print(f"report.html is not made again: {error.what}", file=sys.stderr)
    if as_json:
        emit({**done.as_dict(), "ok": done.ok})
        raise typer.Exit(0 if done.ok else VerificationError.exit_code)
    show(*done.renderables())
    if not done.ok:
        raise failed(done, bundle / "evidence")


def table(
    folders: Annotated[list[Path], typer.Argument(help="Bundles, or output folders with bundles.")],
    as_json: Json = False,
) -> None:
    """Print a table of bundles: verdict, cases, equal tokens, task score, size and runtime, from their evidence."""
    with reported(as_json):
        from builder.bundle import table
        from builder.util.console_table import show

        found = table.rows(table.bundles_in(folders))
        if as_json:
            emit({"ok": True, "bundles": table.as_dicts(found)})
        else:
            show(*table.renderables(found))
