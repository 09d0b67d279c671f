"""In: what a build or a test run left behind. Out: the same as a Markdown table, on stdout.

python -m tests.tables stages outputs/bench      # stage.json of each stage
python -m tests.tables results results.xml …     # JUnit XML of pytest, of one run or of its parts
"""

from __future__ import annotations

import json
import platform
import sys
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

SHOWN = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai")


def stages(output: Path) -> str:
    """Seconds, peak memory and bytes of artifacts a stage."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(output.glob("*/stage.json"))]
    rows = [
        f"| {one['stage']} | {one['wall_s']:.1f} | {(one['peak_rss'] or 0) / 1e6:,.0f} "
        f"| {sum(one['files'].values()) / 1e6:,.1f} |"
        for one in records
    ]
    return "\n".join(["| stage | s | peak MB | artifacts MB |", "|---|--:|--:|--:|", *rows])


def results(*files: Path) -> str:
    """Tests, failures and seconds a test file, under a line that says on what."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    seconds: dict[str, float] = defaultdict(float)
    for case in (case for file in files for case in ElementTree.parse(file).iter("testcase")):
        name = ".".join(case.get("classname", "").split(".")[:2]) or case.get("name", "")
        outcome = {child.tag for child in case} & {"failure", "error", "skipped"}
        counts[name].update(["tests", *outcome])
        seconds[name] += float(case.get("time", 0))
    counts["**all**"] = sum(counts.values(), Counter())
    seconds["**all**"] = sum(seconds.values())
    rows = [
        f"| {name} | {one['tests']} | {one['failure'] + one['error']} | {one['skipped']} | {seconds[name]:.1f} |"
        for name, one in sorted(counts.items(), key=lambda item: (item[0] == "**all**", item[0]))
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
    kind, *paths = sys.argv[1:]
    print(stages(Path(*paths)) if kind == "stages" else results(*map(Path, paths)))
