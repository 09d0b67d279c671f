"""What the console would show of a report or a self-test, as text."""

from __future__ import annotations

from builder.util.console_table import as_text
from builder.verify.report.console import renderables
from builder.verify.report.gates import Report
from builder.verify.self_test.run import SelfTest


def shown(found: Report | SelfTest) -> str:
    return as_text(*(renderables(found) if isinstance(found, Report) else found.renderables()))
