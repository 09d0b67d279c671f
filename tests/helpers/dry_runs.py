"""Dry runs of `build`, in this process or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from typer.testing import CliRunner, Result

from builder.cli.app import app
from tests.helpers.processes import ROOT


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["build", *map(str, arguments)])


def spawned(*arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def estimate(result: Result, code: int = 0) -> dict[str, Any]:
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout)["estimate"]
    return found


def stage(figures: Mapping[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in figures["stages"] if entry["stage"] == name)
