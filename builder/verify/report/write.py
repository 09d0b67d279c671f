"""Write a verification's report: parity.json, exhibits.json, parity.txt, report.html, report.md and junit.xml.

Guarantees: `render` rebuilds the last three from the two JSON files, without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from builder.bundle.layout import own_evidence
from builder.util.console_table import as_text
from builder.util.errors import OutputError
from builder.util.files import write_text
from builder.verify.report.console import renderables
from builder.verify.report.context import Context, of_bundle
from builder.verify.report.formats import encodable, exhibits_text, parity_text, read_report
from builder.verify.report.gates import Report
from builder.verify.report.html import html
from builder.verify.report.junit import junit
from builder.verify.report.markdown import markdown

EVIDENCE = "evidence"
PAGES: Mapping[str, Callable[[Report, Context], str]] = {
    "report.html": html,
    "report.md": markdown,
    "junit.xml": junit,
}


def write(report: Report, folder: Path, context: Context) -> None:
    """Write all forms of a report into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "parity.json", parity_text(report))
    write_text(folder / "exhibits.json", exhibits_text(report))
    write_text(folder / "parity.txt", encodable(as_text(*renderables(report))) + "\n")
    write_pages(report, folder, context)


def write_pages(report: Report, folder: Path, context: Context) -> None:
    """Write the pages for people and CI into `folder`."""
    for name, render in PAGES.items():
        write_text(folder / name, render(report, context))


def render(bundle: Path, requested: Mapping[str, Path]) -> tuple[Report, list[Path]]:
    """Rebuild the pages of a bundle's last report.

    Args:
        requested: page name (see `PAGES`) → where to write it; if empty, all pages go into the bundle's evidence/.

    Returns:
        the report, and the files written.

    Raises:
        BundleError: see `rendered`.
        OutputError: a file cannot be written.
    """
    report, context = rendered(bundle)
    files = dict(requested) or {name: own_evidence(bundle) / name for name in PAGES}
    for name, path in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, PAGES[name](report, context))
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written",
                expected="a writable file",
                found=error.strerror,
                next="give another file",
            ) from error
    return report, list(files.values())


def rendered(bundle: Path) -> tuple[Report, Context]:
    """Read the last report of a bundle, and its context.

    Raises:
        BundleError: `bundle` is not a bundle, or has no readable report.
    """
    context = of_bundle(bundle)
    return read_report(bundle / EVIDENCE), context
