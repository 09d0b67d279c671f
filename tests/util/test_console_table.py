"""Tables for a person: nothing is cut, 80 columns are enough, colour only where somebody looks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from builder.util.console_table import as_text, console_table
from tests.helpers.processes import ROOT

ROWS = [
    ("decoder layers", "pass", "16/16", "a long case, its tokens 1,024–1,040, and more " * 3),
    ("tokens", "FAIL", "1/3", "[b]x"),
]
HEADINGS = ("place", "", "cases", "at")
PROGRAM = f"""
from builder.util.console_table import console_table, show
show(console_table("A title", {HEADINGS!r}, {ROWS!r}, right=("cases",)), "a sentence " * 20)
"""


def run(*, terminal: bool, **environment: str) -> str:
    """What a process prints, on a terminal of its own or into a pipe."""
    program = PROGRAM if not terminal else f"import pty, sys; pty.spawn([sys.executable, '-c', {PROGRAM!r}])"
    given = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **environment}
    return subprocess.run([sys.executable, "-c", program], env=given, capture_output=True, text=True, check=True).stdout


def test_a_file_has_rows_as_long_as_they_are() -> None:
    text = as_text(console_table("A title", HEADINGS, ROWS, right=("cases",)), "a sentence " * 20)
    assert ROWS[0][3].strip() in text
    assert "[b]x" in text
    assert "\x1b" not in text
    assert not any(line.endswith(" ") for line in text.splitlines())


@pytest.mark.parametrize("environment", [{}, {"COLUMNS": "80"}])
@pytest.mark.seconds
def test_a_pipe_has_80_columns_and_no_colour(environment: dict[str, str]) -> None:
    *rows, sentence = run(terminal=False, **environment).splitlines()
    assert all(len(line) <= 80 for line in rows)
    assert "\x1b" not in "".join(rows)
    folded = "".join(line[-50:] for line in rows).replace(" ", "")
    assert folded.count("1,024–1,040") == 3
    assert len(sentence) > 80  # not folded: a command in it can be copied


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.seconds
def test_a_terminal_shows_a_failure_in_colour_unless_it_is_asked_not_to() -> None:
    assert "\x1b[1;31mFAIL" in run(terminal=True)
    assert "31mFAIL" not in run(terminal=True, NO_COLOR="1")
