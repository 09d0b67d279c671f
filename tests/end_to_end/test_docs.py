"""The commands in docs/: each block marked `sh` is run as it stands, page after page, in one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.checkpoints import MINIATURE

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PICTURE = MINIATURE.parent / "heldout" / "pic002.png"
# In an order in which each finds what the ones before it have made.
PAGES = ("regenerate", "pipeline", "verify-in-ci", "troubleshooting", "ship")
BLOCK = re.compile(r"^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"(?:\S+/|--recipe |qwen3vl-onnx (?=publish))([\w-]+(?:\.sh)?)(?:$| \")", re.MULTILINE)
RUN_ELSEWHERE = re.compile(r"`(tests/[\w/]+\.py)`:?\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and what stands before it."""

    page: str
    kind: str
    text: str
    before: str


def blocks(page: str) -> list[Block]:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    return [Block(page, one["kind"], one["text"], text[: one.start()]) for one in BLOCK.finditer(text)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader sits who follows the pages."""
    return tmp_path_factory.mktemp("reader")


def environment(page: str) -> dict[str, str]:
    """What the pages call by a name."""
    target = "onnxruntime" if page == "pipeline" else "genai"
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "CHECKPOINT": str(MINIATURE),
        "PICTURE": str(PICTURE),
        "BUNDLE": f"out/8-bundle/{target}",
        "OTHER": "out-int4/8-bundle/genai",
    }


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_does_what_it_says(page: str, folder: Path) -> None:
    for block in blocks(page):
        if block.kind != "sh":
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=folder,
            env=environment(page),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr, done.stderr
        if "qwen3vl-onnx run" in block.text or "pipeline.py" in block.text:
            assert done.stdout.strip().splitlines()[-1] == "28"


def test_a_block_that_is_not_run_here_names_the_test_that_runs_it() -> None:
    seen = 0
    for page in PAGES:
        for block in blocks(page):
            assert block.kind in ("sh", "console", "toml", ""), f"{page}: a block of {block.kind}"
            if block.kind == "console":
                named = RUN_ELSEWHERE.search(block.before)
                assert named is not None, f"{page}: {block.text}"
                program = NAMED.search(block.text)
                assert program is not None
                assert program[1] in (ROOT / named[1]).read_text(encoding="utf-8")
                seen += 1
    assert seen


def test_every_page_is_found_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert f"docs/{page}.md" in readme, page


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_are_named_in_passing_exist(page: str) -> None:
    from typer.main import get_command

    from builder.cli.app import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    named = re.findall(r"qwen3vl-onnx (\w+)((?: +--[\w-]+)*)", (DOCS / f"{page}.md").read_text(encoding="utf-8"))
    assert named or page == "pipeline"
    for name, options in named:
        assert name in commands, name
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(options.split()) <= known, f"{name} {options}"
