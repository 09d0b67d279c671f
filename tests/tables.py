"""Summarize JUnit XML files of pytest as a Markdown table: `python -m tests.tables results.xml …`."""

from __future__ import annotations

import platform
import sys
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

SHOWN = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai")


def results(*files: Path) -> str:
    """Return a table of tests, failures and seconds per test file, after a line with machine and packages."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    seconds: dict[str, float] = defaultdict(float)
    for case in (case for file in files for case in ElementTree.parse(file).iter("testcase")):
        parts = case.get("classname", "").split(".")
        module = next((n for n, part in enumerate(parts, start=1) if part.startswith("test_")), len(parts))
        name = ".".join(parts[:module]) or case.get("name", "")
        outcome = {child.tag for child in case} & {"failure", "error", "skipped"}
        counts[name].update(["tests", *outcome])
        seconds[name] += float(case.get("time", 0))
    counts["**all**"] = sum(counts.values(), Counter())
    seconds["**all**"] = sum(seconds.values())
    rows = [
        f"| {name} | {row['tests']} | {row['failure'] + row['error']} | {row['skipped']} | {seconds[name]:.1f} |"
        for name, row in sorted(counts.items(), key=lambda item: (item[0] == "**all**", item[0]))
    ]
    packages = ", ".join(f"{name} {version(name)}" for name in SHOWN)
    head = [
        "# Results of `make test-full`",
        "",
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {packages}.",
        "",
        "| file | tests | failed | skipped | s |",
        "|---|--:|--:|--:|--:|",
    ]
    return "\n".join([*head, *rows])


if __name__ == "__main__":
    print(results(*map(Path, sys.argv[1:])))
