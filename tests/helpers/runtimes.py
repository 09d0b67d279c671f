"""Require runtimes that are not Python packages of this project.

A missing runtime skips the test, or fails it if EVERY_RUNTIME is set (`make test-full`).
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
    """Skip the test, or fail it, if a runtime is missing."""
    if missing is None:
        return
    if os.environ.get("EVERY_RUNTIME"):
        pytest.fail(f"not run: {missing}")
    pytest.skip(f"not run: {missing}")


def require_openvino() -> None:
    require(RUNTIMES["openvino"].missing())


def require_node() -> str:
    """Return the path of Node.js, with the packages of the example installed."""
    node = shutil.which("node")
    require(None if node else "Node.js is not installed")
    there = (NODE_EXAMPLE / "node_modules" / "onnxruntime-node").is_dir()
    require(None if there else f"the packages of examples/node are not installed: {INSTALL}")
    assert node is not None
    return node
