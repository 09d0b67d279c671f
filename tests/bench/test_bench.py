"""Test the bench: synthetic checkpoints load, results are rendered, failures are rows."""

from __future__ import annotations

import shutil
import signal
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from bench import comparators, synthetic
from bench.builds import data_files, seconds_in, stages
from bench.comparators import Copy, Decoder
from bench.measure import Run, failed, run, total, typical
from bench.size import Options, measure
from bench.size import miniature as miniature_of
from bench.synthetic import MARKER, SIZES, is_complete, shapes, write_synthetic
from bench.table import Result, copy_row, decoder_rows, document, section, verify_rows
from builder.checkpoint.load import Checkpoint, open_checkpoint
from builder.checkpoint.safetensors import INDEX, SINGLE
from builder.checkpoint.tensors import EMBEDDINGS
from builder.stages.engine.cache_key import Components
from builder.stages.engine.output_folder import Record, write_record
from builder.util.cost import Cost
from builder.util.files import sha256
from tests.helpers.checkpoints import SPECIAL_SCALE

COST = Cost(10.0, 12.5, 800_000_000, 4_000_000_000, 8_000_000_000)
GOOD = Run(COST, None, "")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest synthetic checkpoint; tests must not change it."""
    return write_synthetic(tmp_path_factory.mktemp("bench") / "tiny", "tiny")


def values(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return checkpoint.read(name).astype(np.float32)


@pytest.mark.seconds
def test_tiny_is_a_checkpoint_with_every_weight_varied(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == shapes("tiny")
    for name in checkpoint.tensors:
        got = values(checkpoint, name)
        assert np.isfinite(got).all()
        assert got.std() > 0.01, name
    # safetensors' own reader accepts the file.
    with safe_open(tiny / SINGLE, "np") as file:
        assert set(file.keys()) == set(checkpoint.tensors)
    first, second = (f"model.language_model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    assert abs(np.corrcoef(values(checkpoint, first).ravel(), values(checkpoint, second).ravel())[0, 1]) < 0.1


@pytest.mark.seconds
def test_rows_of_the_embeddings_differ_although_the_noise_repeats(tiny: Path) -> None:
    """Equal rows would be tokens that tie at every step; those of special tokens are small."""
    checkpoint = open_checkpoint(tiny)
    assert prod(checkpoint.tensors[EMBEDDINGS].shape) > synthetic.POOL
    rows = values(checkpoint, EMBEDDINGS)
    assert len(np.unique(rows, axis=0)) == len(rows)
    special = checkpoint.image_token_id
    assert rows[special:].std() == pytest.approx(SPECIAL_SCALE * rows[: special - 100].std(), rel=0.05)


@pytest.mark.seconds
def test_the_same_bytes_for_the_same_seed_whatever_the_block(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "BLOCK", 100_003)
    again, other = write_synthetic(tmp_path / "again", "tiny"), write_synthetic(tmp_path / "other", "tiny", seed=1)
    assert {file.name: sha256(file) for file in tiny.iterdir()} == {file.name: sha256(file) for file in again.iterdir()}
    assert sha256(other / SINGLE) != sha256(tiny / SINGLE)


@pytest.mark.seconds
def test_shards_respect_the_limit_and_come_with_an_index(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 400_000
    monkeypatch.setattr(synthetic, "SHARD_BYTES", limit)
    single, sharded = open_checkpoint(tiny), open_checkpoint(write_synthetic(tmp_path / "sharded", "tiny"))
    assert INDEX in sharded.files
    held: dict[str, list[str]] = {}
    for name, tensor in sharded.tensors.items():
        held.setdefault(tensor.file, []).append(name)
        np.testing.assert_array_equal(sharded.read(name), single.read(name))
    assert len(held) > 2
    sizes = [sum(sharded.tensors[name].nbytes for name in names) for names in held.values() if len(names) > 1]
    assert max(sizes) <= limit


def test_only_a_complete_checkpoint_is_reused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_complete(tiny, "tiny")
    assert not is_complete(tiny, "tiny", seed=1)
    assert not is_complete(tiny, "mid")
    before = (tiny / SINGLE).stat()
    assert write_synthetic(tiny, "tiny") == tiny
    assert (tiny / SINGLE).stat() == before

    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / SINGLE).write_bytes(b"half")
    assert not is_complete(killed, "tiny")
    write_synthetic(killed, "tiny")
    assert sha256(killed / SINGLE) == sha256(tiny / SINGLE)

    def cut(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "_write_tensor", cut)
    with pytest.raises(KeyboardInterrupt):
        write_synthetic(tmp_path / "cut", "tiny")
    assert not (tmp_path / "cut" / MARKER).exists()


@pytest.mark.parametrize(("size", "millions"), [("mid", 117), ("2b", 2128), ("4b", 4438), ("8b", 8767)])
def test_sizes_have_the_weights_of_the_real_models(size: str, millions: int) -> None:
    """As in the releases, to the million; `mid` follows from its dimensions."""
    weights = shapes(size)
    assert round(sum(map(prod, weights.values())) / 1e6) == millions
    assert ("lm_head.weight" in weights) is not SIZES[size].tied


def test_a_process_is_measured_with_its_children() -> None:
    child = "b = b'x' * 300_000_000; print('done')"
    done = run([sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"])
    assert (done.failure, done.output) == (None, "done\n")
    assert done.cost.peak_rss is not None
    assert done.cost.peak_rss > 300_000_000
    assert done.cost.cpu_s > 0


def test_a_failed_or_killed_process_reports_how() -> None:
    program = "import sys; print('/home/someone/x.py: begins', file=sys.stderr); raise MemoryError('no room')"
    assert run([sys.executable, "-c", program]).failure == "exit 1: MemoryError: no room"
    killed = run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    assert killed.failure == "killed by SIGKILL"
    # The last words, without a frame and without this machine's folders.
    assert failed(3, "│ at /home/someone/a/b.py, line 3   │\n╰──╯\n") == "exit 3: at …/b.py, line 3"
    assert failed(-signal.SIGTERM, "10%\r20%") == "killed by SIGTERM: 20%"


def test_medians_sums_and_the_highest_peak() -> None:
    costs = [Cost(seconds, 2 * seconds, peak, 10, None) for seconds, peak in ((3.0, 5), (1.0, 9), (2.0, None))]
    assert typical(costs) == Cost(2.0, 4.0, 9, 10, None)
    assert total(costs) == Cost(6.0, 12.0, 9, 30, 0)


def test_stages_and_data_files_are_read_from_a_build(tmp_path: Path) -> None:
    for folder, stage in (("1-fetch", "fetch"), ("5-quantize", "quantize")):
        (tmp_path / folder / "genai").mkdir(parents=True)
        write_record(tmp_path / folder, Record(stage, "", Components({}, {}, {}, {}), {}, {}, {}, "", COST))
    small, large = (tmp_path / "5-quantize" / "genai" / name for name in ("a.onnx.data", "b.onnx.data"))
    small.write_bytes(b"1")
    large.write_bytes(b"123")
    (tmp_path / "5-quantize" / "onnxruntime").mkdir()
    (tmp_path / "5-quantize" / "onnxruntime" / "b.onnx.data").hardlink_to(large)
    assert stages(tmp_path) == {"fetch": COST, "quantize": COST}
    assert data_files(tmp_path) == [large, small]
    output = '{"stages": [{"stage": "export", "state": "%s", "wall_s": 41.5}]}'
    assert seconds_in(replace(GOOD, output=output % "link"), "export") == (41.5, "link")
    assert seconds_in(replace(GOOD, output=output % "run"), "export") == (41.5, "run")
    assert seconds_in(replace(GOOD, output=output % "cached"), "export") == (0.0, "cached")


def test_a_section_has_a_line_per_stage_and_a_total_without_verify() -> None:
    verify = replace(COST, wall_s=90.0, peak_rss=3_900_000_000, read=None, written=None)
    text = section(Result("2b", "About.", {"export": COST, "verify": verify, "bundle": COST}))
    assert text.splitlines()[4:] == [
        "| stage | wall s | CPU s | peak RSS MB | read MB | written MB |",
        "|---|--:|--:|--:|--:|--:|",
        "| export | 10.0 | 12.5 | 800 | 4,000 | 8,000 |",
        "| verify | 90.0 | 12.5 | 3,900 | – | – |",
        "| bundle | 10.0 | 12.5 | 800 | 4,000 | 8,000 |",
        "| **all but verify** | 20.0 | 25.0 | 800 | 8,000 | 16,000 |",
    ]


def test_a_comparator_that_fails_is_a_row() -> None:
    killed = Run(replace(COST, peak_rss=23_000_000_000), "killed by SIGKILL", "")
    rows = decoder_rows("fp32", [Decoder(GOOD, 11.0, 7_000_000_000)], [Decoder(killed, 0.0, 0)], "≤ 1.0")
    assert [(row.ours, row.other, row.ratio) for row in rows] == [
        ("10.0 s", "–", "–"),
        ("11.0 s", "–", "–"),
        ("800 MB", "23,000 MB", "0.03"),
    ]
    assert {row.note for row in rows} == {"onnxruntime-genai: killed by SIGKILL"}
    failing = copy_row(12.0, 100, [Copy(0.0, 0, "exit 1: cp: unrecognized option | no")], "≤ 1.5")
    assert (failing.ours, failing.other, failing.ratio) == ("12.0 s", "–", "–")
    assert section(Result("4b", "", {}, (failing,))).endswith("| exit 1: cp: unrecognized option \\| no |")


def test_a_failed_verification_has_no_figures() -> None:
    wall, peak = verify_rows("verify", GOOD, "≤ 4,000 MB")
    assert (wall.ours, wall.note) == ("10.0 s", "")
    assert (peak.ours, peak.wanted) == ("800 MB", "≤ 4,000 MB")
    for row in verify_rows("verify", replace(GOOD, failure="exit 20: no"), "≤ 4,000 MB"):
        assert (row.ours, row.note) == ("–", "exit 20: no (after 10.0 s, at 800 MB)")


def test_decoders_are_compared_by_their_medians_and_highest_peaks() -> None:
    def side(*walls: float) -> list[Decoder]:
        return [Decoder(replace(GOOD, cost=replace(COST, wall_s=wall)), wall + 1, 5_000_000) for wall in walls]

    wall, flushed, _ = decoder_rows("fp32", side(6.0, 30.0, 5.0), side(10.0, 12.0, 99.0), "≤ 1.0")
    assert (wall.ours, wall.other, wall.ratio, wall.note) == ("6.0 s", "12.0 s", "0.50", "5 MB and 5 MB")
    assert (flushed.ours, flushed.other, flushed.ratio) == ("7.0 s", "13.0 s", "0.54")


def test_a_missing_builder_package_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparators, "GENAI", ("-m", "no_such_builder"))
    decoder = comparators.theirs(tmp_path, tmp_path / "out", "fp32")
    assert decoder.run.failure is not None
    assert decoder.run.failure.endswith("No module named no_such_builder")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.torch
def test_our_decoder_alone_equals_that_of_a_build(miniature: Path, miniature_built: Path, tmp_path: Path) -> None:
    assert run([sys.executable, *comparators.OURS, miniature, tmp_path, "fp32"]).failure is None
    assert {file.name: sha256(file) for file in tmp_path.iterdir()} == {
        name: sha256(miniature_built / "genai" / name) for name in ("model.onnx", "model.onnx.data")
    }


def test_a_copy_is_removed_and_reports_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "large", tmp_path / "small"]
    for file, size in zip(files, (3_000_000, 1_000_000), strict=True):
        file.write_bytes(bytes(size))
    done = comparators.copy(files, tmp_path / "copy")
    assert (done.nbytes, done.failure) == (4_000_000, None)
    assert sorted(tmp_path.iterdir()) == sorted(files)
    row = copy_row(9.0, 4_000_000, [replace(done, wall_s=6.0)], "≤ 1.5")
    assert (row.other, row.ratio, row.note) == ("6.0 s", "1.50", "4 MB")

    free = comparators.SPARE + 2_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    partly = comparators.copy(files, tmp_path / "copy")
    assert partly.nbytes == 1_000_000
    row = copy_row(9.0, 4_000_000, [replace(partly, wall_s=2.0)], "≤ 1.5")
    assert (row.other, row.ratio) == ("8.0 s", "1.12")
    assert "1 MB, for which the disk had room" in row.note
    free = 0
    assert comparators.copy(files, tmp_path / "copy").failure == "no room on the disk for a second copy of any file"


@pytest.mark.seconds
def test_a_build_that_fails_or_does_not_fit_the_disk_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(tmp_path, repeat=2, keep=False, comparators=True, verify=True, log=lambda text: None)
    left = tmp_path / "tiny" / "second"
    left.mkdir(parents=True)
    monkeypatch.setattr("bench.size.build", lambda *arguments: replace(GOOD, failure="exit 24: no memory"))
    result = measure("tiny", options)
    assert (result.ok, result.about) == (False, "The build failed: exit 24: no memory")
    assert not left.exists()
    assert not miniature_of(options).ok
    monkeypatch.setattr("bench.size.needed", lambda folder, size: (10**15, 2 * 10**15))
    result = measure("tiny", options)
    assert not result.ok
    assert result.about.startswith("Not run: needs 1000000.0 GB of disk for the checkpoint, 2000000.0 GB for a build")


def test_a_document_keeps_the_sections_of_the_same_machine_only(tmp_path: Path) -> None:
    file = tmp_path / "bench.md"
    first = section(Result("miniature", "One.", {"export": COST}))
    file.write_text(document({"miniature": first, "2b": section(Result("2b", "Two.", {}))}, file))
    file.write_text(document({"2b": section(Result("2b", "Anew.", {})), "8b": "## 8b\n\nEight."}, file))
    text = file.read_text()
    assert text.startswith("# What a build costs\n")
    assert first in text
    assert text.endswith("\n\n## 2b\n\nAnew.\n\n## 8b\n\nEight.\n")
    assert "Two." not in text
    file.write_text(text.replace("torch 2", "torch 1", 1))
    assert "Anew." not in document({"8b": "## 8b\n\nEight."}, file)
    assert str(Path.home()) not in text


@pytest.mark.seconds
def test_an_unknown_size_is_refused_with_the_known_sizes() -> None:
    done = run([sys.executable, "-m", "bench", "--size", "3b"], settings={"COLUMNS": "200"})
    assert done.failure is not None
    assert done.failure.startswith("exit 2: ")
    assert "'3b'; expected one of: tiny, mid, 2b" in done.failure
