"""The console script is what every text recommends: `python -m builder` runs whatever `builder` is nearest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.helpers.processes import ROOT

SCRIPT = Path(sys.executable).parent / "qwen3vl-onnx"
TEXTS = (".py", ".md", ".toml", ".sh", ".yml", ".mjs", ".j2", ".html")
# Of the releases before, or about the module itself.
MAY_NAME_IT = ("CHANGELOG.md", "builder/__main__.py", "ci/verify.sh", "tests/cli/test_console_script.py")


def test_it_is_ours_in_a_folder_with_another_builder(tmp_path: Path) -> None:
    (tmp_path / "builder.py").write_text("print('another builder')")
    command = [str(SCRIPT), "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("qwen3vl-onnx ")


def test_no_text_recommends_the_module() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    texts = [name for name in listed if (name.endswith(TEXTS) or name == "Makefile") and name not in MAY_NAME_IT]
    assert len(texts) > 200
    found = [name for name in texts if "-m builder" in (ROOT / name).read_text(encoding="utf-8")]
    assert not found
