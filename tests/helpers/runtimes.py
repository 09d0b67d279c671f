"""Runtimes that are not Python packages of this project, for tests that play bundles in them.

In: what is missing on this machine, if anything. Out: a test that is skipped with that word, or, where everything must
be there (`make test-full` sets EVERY_RUNTIME), one that fails with it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from builder.targets.runners.registry import RUNTIMES

ROOT = Path(__file__).parents[2]
NODE_EXAMPLE = ROOT / "examples" / "node"
INSTALL = "npm --prefix examples/node ci"


def require(missing: str | None) -> None:
    """Skips the test, or fails it, where something is missing."""
    if missing is None:
        return
    if os.environ.get("EVERY_RUNTIME"):
        pytest.fail(f"not run: {missing}")
    pytest.skip(f"not run: {missing}")


def require_openvino() -> None:
    require(RUNTIMES["openvino"].missing())


def require_node() -> str:
    """The path of Node.js; the example's packages are installed."""
    node = shutil.which("node")
    require(None if node else "Node.js is not installed")
    there = (NODE_EXAMPLE / "node_modules" / "onnxruntime-node").is_dir()
    require(None if there else f"the packages of examples/node are not installed: {INSTALL}")
    assert node is not None
    return node
