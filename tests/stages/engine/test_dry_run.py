"""`build --dry-run`, and builds that are refused because they do not fit."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path

import pytest

from builder.checkpoint.config import read_architecture
from builder.checkpoint.tensors import expected_tensors
from builder.stages.engine.dry_run import Disk, disks, left_over
from builder.util import machine
from builder.util.units import duration, size
from tests.helpers.dry_runs import estimate, invoke, spawned, stage

ROOT = Path(__file__).parents[3]
NAMES = ["fetch", "patch", "export", "optimize", "quantize", "configure", "verify", "bundle"]
GB = 10**9
# The real 2B's.
TEXT = {
    "hidden_size": 2048,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 6144,
    "vocab_size": 151936,
}
VISION = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "deepstack_visual_indexes": [5, 11, 17],
    "num_position_embeddings": 2304,
    "out_hidden_size": 2048,
}
# Runs a command, then says what it cost.
MEASURED = """
import sys
from builder.cli.app import app
before = int(open("/proc/self/io").read().split()[1])
try:
    app(sys.argv[1:], standalone_mode=False)
finally:
    status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
    read = int(open("/proc/self/io").read().split()[1]) - before
    print(read, int(status["VmHWM"].split()[0]) * 1024, "torch" in sys.modules, file=sys.stderr)
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def sparse(folder: Path, miniature: Path) -> Path:
    """A checkpoint of the real 2B's sizes whose weights are a sparse file."""
    folder.mkdir()
    for file in miniature.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= TEXT
    config["text_config"]["rope_parameters"]["mrope_section"] = [24, 20, 20]
    config["vision_config"] |= VISION
    (folder / "config.json").write_text(json.dumps(config))
    header, at = {}, 0
    for name, shape in expected_tensors(config, *read_architecture(config)).items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as weights:
        weights.write(struct.pack("<Q", len(text)) + text)
        weights.truncate(8 + len(text) + at)
    return folder


def test_a_dry_run_shows_every_stage_and_graph_and_writes_nothing() -> None:
    result = invoke("--dry-run")
    assert result.exit_code == 0, result.output
    rows = [re.split(r"\s{2,}", line.strip()) for line in result.stdout.splitlines() if line.strip()]
    shown = {row[0]: row[1:] for row in reversed(rows)}  # tables before sentences
    assert shown["genai/model.onnx"][1:] == ["model.onnx.data", "7,622,656"]
    assert shown["genai/embeddings.onnx"][1:] == ["model.onnx.data", "shared"]
    assert shown["onnxruntime/model.onnx"][1:] == ["model.onnx.data", "linked"]
    assert [shown[name][0] for name in NAMES] == ["run: first time"] * 8
    assert "free under outputs/miniature-fp32" in result.stdout
    assert result.stdout.count(": fits") == 2
    assert not list(Path().iterdir())


def test_the_shape_of_the_json() -> None:
    result = invoke("--dry-run", "--json", "--until", "quantize")
    payload = json.loads(result.stdout)
    assert {"ok", "checkpoint", "output", "estimate"} == set(payload)
    figures = estimate(result)
    assert set(figures) == {
        "fits", "stages", "graphs", "data_bytes", "download", "disks", "memory", "seconds",
    }  # fmt: skip
    assert [entry["stage"] for entry in figures["stages"]] == NAMES[:5]
    assert set(figures["stages"][0]) == {"stage", "state", "why", "written", "memory", "seconds"}
    assert set(figures["graphs"][0]) == {"target", "graph", "graph_bytes", "data", "data_bytes"}
    assert figures["fits"] is True
    assert figures["data_bytes"] == sum(row["data_bytes"] for row in figures["graphs"]) == 13_606_912
    assert figures["download"] == {"files": {}, "bytes": 0}
    (disk,) = figures["disks"]
    assert set(disk) == {"folder", "needed", "free", "output"}
    assert disk["needed"] == disk["output"] == sum(entry["written"] for entry in figures["stages"])
    assert figures["memory"]["needed"] == max(entry["memory"] for entry in figures["stages"])
    assert figures["memory"]["limit"] == machine.memory_limit()


@pytest.mark.seconds
def test_real_sizes_are_estimated_without_reading_weights_or_importing_torch(tmp_path: Path, miniature: Path) -> None:
    if not Path("/proc/self/io").is_file():
        pytest.skip("no /proc")
    folder = sparse(tmp_path / "big", miniature)
    size_of_weights = (folder / "model.safetensors").stat().st_size
    assert size_of_weights > 4 * GB
    done = spawned("-c", MEASURED, "build", folder, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    read, resident, torch = done.stderr.split()[-3:]
    assert int(read) < 100_000_000
    assert int(resident) < 400_000_000
    assert torch == "False"
    figures = json.loads(done.stdout)["estimate"]
    assert 2 * size_of_weights * 0.999 < figures["data_bytes"] < 2 * size_of_weights * 1.001
    assert (folder / "model.safetensors").stat().st_blocks * 512 < 1_000_000


def test_a_cached_stage_costs_nothing() -> None:
    assert invoke("--until", "fetch").exit_code == 0
    figures = estimate(invoke("--dry-run", "--json"))
    assert [entry["state"] for entry in figures["stages"]] == ["cached"] + ["run"] * 7
    assert stage(figures, "fetch")["written"] == stage(figures, "fetch")["memory"] == 0
    done = estimate(invoke("--dry-run", "--json", "--until", "fetch"))
    assert (done["graphs"], done["seconds"], done["memory"]["needed"]) == ([], 0, 0)


@pytest.mark.torch
def test_data_files_on_disk_are_not_needed_again(
    miniature: Path, miniature_built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (miniature, "--output", miniature_built.parent, "--dry-run", "--json")
    figures = estimate(invoke(*arguments))
    assert [entry["state"] for entry in figures["stages"]] == ["cached"] * 6 + ["run"] * 2
    assert (figures["graphs"], figures["data_bytes"]) == ([], 0)
    assert figures["disks"][0]["needed"] < 1_000_000
    monkeypatch.setattr(machine, "free_disk", lambda path: 1_000_000)
    assert estimate(invoke(*arguments))["fits"] is True
    assert estimate(invoke(*arguments, "--force", "quantize"), 24)["data_bytes"] == 13_606_912


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setattr(machine, "free_disk", lambda path: 10**7)
    result = invoke("--output", "there", "--json", *options)
    payload = json.loads(result.stdout)
    figures = estimate(result, 24)
    assert (payload["ok"], payload["error"], payload["exit_code"]) == (False, "ResourceError", 24)
    assert payload["expected"] == f"{size(figures['disks'][0]['needed'])} of disk under there"
    assert payload["found"] == "10 MB of disk"
    assert payload["next"] == "give another --output"
    assert figures["fits"] is False
    assert figures["disks"][0]["free"] == 10**7
    assert result.stderr.startswith(f"error: {payload['what']}")
    assert not list(Path().iterdir())


def test_a_refused_dry_run_shows_its_tables_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_disk", lambda path: 10**7)
    result = invoke("--dry-run")
    assert result.exit_code == 24
    assert "10 MB: TOO LITTLE" in result.stdout
    assert "genai/model.onnx" in result.stdout
    assert result.stderr.startswith("error: this build needs more")


def test_too_little_memory_for_verify_alone_leaves_the_build_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_limit", lambda: 9 * 10**8)
    result = invoke("--dry-run", "--json")
    figures, payload = estimate(result, 24), json.loads(result.stdout)
    assert figures["memory"] == {
        "needed": stage(figures, "verify")["memory"],
        "limit": 9 * 10**8,
        "verify": "layerwise",
    }
    assert payload["expected"] == "1.0 GB of memory for the stage verify"
    assert payload["found"] == "900 MB of memory"
    assert "--until configure" in payload["next"]
    assert estimate(invoke("--dry-run", "--json", "--until", "configure"))["fits"] is True


def test_too_little_memory_for_more_than_verify_has_no_workaround(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_limit", lambda: 3 * 10**8)
    payload = json.loads(invoke("--json").stdout)
    assert (payload["exit_code"], payload["found"]) == (24, "300 MB of memory")
    assert "container's limit" in payload["next"]
    assert "--until" not in payload["next"]
    assert not list(Path().iterdir())


def test_verify_is_layerwise_where_the_complete_model_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    complete = estimate(invoke("--dry-run", "--json"))["memory"]
    assert complete["verify"] == "whole"
    monkeypatch.setattr(machine, "memory_limit", lambda: complete["needed"] - 1)
    sliced = estimate(invoke("--dry-run", "--json"))
    assert sliced["fits"] is True
    assert sliced["memory"]["verify"] == "layerwise"
    assert sliced["memory"]["needed"] < complete["needed"]


def test_disk_and_memory_are_reported_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_disk", lambda path: 1)
    monkeypatch.setattr(machine, "memory_limit", lambda: 1)
    payload = json.loads(invoke("--json").stdout)
    assert "of disk" in payload["expected"]
    assert "of memory" in payload["expected"]
    assert payload["next"].startswith("give another --output; raise")


def test_a_build_with_nothing_to_run_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke("--until", "fetch").exit_code == 0
    monkeypatch.setattr(machine, "free_disk", lambda path: 0)
    monkeypatch.setattr(machine, "memory_limit", lambda: 1)
    assert "nothing changed" in invoke("--until", "fetch").stderr
    assert invoke("--until", "patch").exit_code == 24


def test_a_shared_disk_is_counted_once_and_two_disks_separately(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "free_disk", lambda path: 100)
    output, cache = tmp_path / "output", tmp_path / "cache"
    (both,) = disks({"output": (output, 60), "download": (cache, 70)}, 5)
    assert both == Disk(output, {"output": 60, "download": 70}, 105)
    assert (both.needed, both.short) == (130, True)
    monkeypatch.setattr(machine, "same_disk", lambda first, other: False)
    first, second = disks({"output": (output, 60), "download": (cache, 70)}, 5)
    assert (first, second) == (Disk(output, {"output": 60}, 105), Disk(cache, {"download": 70}, 100))
    assert not first.short


def test_what_an_interrupted_build_left_is_free_again(tmp_path: Path) -> None:
    part = tmp_path / "5-quantize.part"
    (part / "genai").mkdir(parents=True)
    (part / "genai" / "model.onnx.data").write_bytes(bytes(1000))
    (part / "second link").hardlink_to(part / "genai" / "model.onnx.data")
    (tmp_path / "whole").write_bytes(bytes(300))
    (part / "of another folder").hardlink_to(tmp_path / "whole")
    assert left_over(tmp_path) == 1000
    assert left_over(tmp_path / "not there") == 0


def test_figures_in_words() -> None:
    assert [size(n) for n in (0, 12_300, 650_400_000, 8_512_000_000)] == ["0 kB", "12 kB", "650 MB", "8.5 GB"]
    assert [duration(s) for s in (45, 720, 12_600)] == ["45 s", "12 min", "3.5 h"]
