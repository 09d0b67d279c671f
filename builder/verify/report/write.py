"""A verification's report, in every form that somebody reads.

In: a `Report`, and what the folder beside it tells (manifest, stages, self-test). Out: parity.json and exhibits.json
for machines, parity.txt, report.html, report.md and junit.xml. Guaranteed: all forms say the same; `render` makes the
last three again from the two JSON files alone, without torch; whatever a checkpoint or a bundle names is shown as text.
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
    """All forms of a report into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "parity.json", parity_text(report))
    write_text(folder / "exhibits.json", exhibits_text(report))
    write_text(folder / "parity.txt", encodable(as_text(*renderables(report))) + "\n")
    write_pages(report, folder, context)


def write_pages(report: Report, folder: Path, context: Context) -> None:
    """What is made for people and for CI, into `folder`."""
    for name, render in PAGES.items():
        write_text(folder / name, render(report, context))


def render(bundle: Path, asked: Mapping[str, Path]) -> tuple[Report, list[Path]]:
    """Pages of a bundle's last report, made again.

    Args:
        asked: name of a page (see `PAGES`) → where to write it; empty for all of them in the bundle's evidence/.

    Returns:
        the report, and the files written.

    Raises:
        BundleError: see `rendered`; OutputError: a file that cannot be written.
    """
    report, context = rendered(bundle)
    files = dict(asked) or {name: own_evidence(bundle) / name for name in PAGES}
    for name, path in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, PAGES[name](report, context))
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written",
                expected="a file that can be",
                found=error.strerror,
                next="give another file",
            ) from error
    return report, list(files.values())


def rendered(bundle: Path) -> tuple[Report, Context]:
    """The last report of a bundle, and what the bundle tells of itself.

    Raises:
        BundleError: no bundle, or no report in it that can be read.
    """
    context = of_bundle(bundle)
    return read_report(bundle / EVIDENCE), context
