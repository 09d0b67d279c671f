"""The memory of a build does not grow with the checkpoint: two sizes, every stage up to `configure`, compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.processes import python

pytestmark = pytest.mark.torch

STAGES = ("1-fetch", "2-patch", "3-export", "4-optimize", "5-quantize", "6-configure")
ROOM = 25 * 10**6  # bytes: what one run differs from the next by, and more nodes in a graph
# Depth and width both: the largest matrix is four times as large as well.
SIZES: Mapping[str, Mapping[str, Any]] = {
    "small": {
        "text": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4},
        "vision": {"hidden_size": 192, "intermediate_size": 768, "depth": 4},
    },
    "large": {
        "text": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 14},
        "vision": {"hidden_size": 384, "intermediate_size": 1536, "depth": 8},
    },
}
# One target, and blocks that are small next to either size. What a control does to it comes first.
DRIVER = """
import sys
from dataclasses import replace
from pathlib import Path
from builder.checkpoint import shard_reader
from builder.graph import external_data
from builder.stages.engine.execute import execute
from builder.targets.recipe import Target
from builder.targets.recipe_file import load_recipe
from builder.checkpoint.source import parse_source
from builder.stages.engine.build import Build

external_data.BLOCK = shard_reader.BLOCK = 1 << 18
external_data.STRIP, shard_reader.STEP = 1 << 20, 1 << 18
recipe = replace(load_recipe("fp32"), targets=(Target("genai", "fused"),))
execute(Build(parse_source(sys.argv[1]), recipe, Path(sys.argv[2])), until=sys.argv[3])
"""
HOARDING = """
from builder.checkpoint.shard_reader import Shard
read, held = Shard.read, []

def hoard(self, start, stop):
    held.append(read(self, start, stop))
    return held[-1]

Shard.read = hoard
"""


def drive(checkpoint: Path, output: Path, until: str, before: str = "") -> None:
    done = python("-c", before + DRIVER, checkpoint, output, until, cwd=output.parent)
    assert done.returncode == 0, done.stderr


def peaks(output: Path) -> dict[str, int]:
    """Stage → bytes."""
    records = sorted(output.glob("*/stage.json"))
    return {record.parent.name: json.loads(record.read_text())["cost"]["peak_rss"] for record in records}


def grown(small: Path, large: Path) -> list[str]:
    """Stages that took more memory in the large build."""
    before, after = peaks(small), peaks(large)
    assert set(before) == set(after) == set(STAGES)
    return [name for name in STAGES if after[name] > before[name] + ROOM]


def written(output: Path) -> int:
    """Bytes of weights."""
    return sum(file.stat().st_size for file in output.glob("5-quantize/genai/*.data"))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Each size, built next to its checkpoint, with a process for stages that need torch and one for the others."""
    folder = tmp_path_factory.mktemp("memory")
    made = {}
    for name, size in SIZES.items():
        checkpoint = write_checkpoint(folder / f"checkpoint-{name}", tied=False, deepstack=(1,), **size)
        made[name] = folder / name
        drive(checkpoint, made[name], "optimize")
        drive(checkpoint, made[name], "configure")
    return made


@pytest.mark.slow
def test_no_stage_needs_more_for_a_larger_checkpoint(outputs: Mapping[str, Path]) -> None:
    small, large = (written(output) for output in outputs.values())
    assert large > 3 * small
    assert large - small > 8 * ROOM
    assert grown(*outputs.values()) == []


def test_a_build_that_keeps_what_it_reads_is_detected(outputs: Mapping[str, Path], tmp_path: Path) -> None:
    """The same driver, writing the weights again and keeping every block that it reads."""
    for name, output in outputs.items():
        shutil.copytree(output, tmp_path / name)
        for stage in ("5-quantize", "6-configure"):
            shutil.rmtree(tmp_path / name / stage)
        drive(output.parent / f"checkpoint-{name}", tmp_path / name, "configure", HOARDING)
        assert written(tmp_path / name) == written(output)
    assert "5-quantize" in grown(*(tmp_path / name for name in outputs))
