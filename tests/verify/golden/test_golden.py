"""Test goldens: intact bundles pass without PyTorch, broken places are named, stale goldens are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from typer.testing import CliRunner

from builder.checkpoint.load import open_checkpoint
from builder.cli.app import app
from builder.reference.cases import SUITE, read_cases, shipped_cases
from builder.targets.clients.pipeline import load_image
from builder.util.errors import CheckpointError, GoldenError, ResourceError
from builder.verify.golden import record, verify
from builder.verify.golden.file import GoldenCase, floats, read_golden
from builder.verify.golden.record import golden_case, sampled
from builder.verify.graphs.compare import compare_sampled
from builder.verify.report.gates import Report
from builder.verify.self_test import mutations
from builder.verify.self_test.mutants import Mutation
from builder.verify.tolerances import FP32
from tests.helpers.base_install import base, without_extra
from tests.helpers.checkpoints import MINIATURE
from tests.helpers.processes import ROOT, python
from tests.helpers.shown import shown

if TYPE_CHECKING:
    from builder.reference.model import Reference

__all__ = ["base"]

GOLDEN = MINIATURE.parent / "golden.json"
TARGETS = ("genai", "onnxruntime")
FEW = ("text", "one image", "wide, tall", "JPEG 4:2:0")


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    document = json.loads(GOLDEN.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The shipped golden, and the shipped cases, reduced to a few."""
    monkeypatch.setattr(
        verify, "read_cases", lambda paths: tuple(case for case in read_cases(paths) if case.name in {*FEW, "mine"})
    )

    def change(document: dict[str, Any]) -> None:
        document["cases"] = [case for case in document["cases"] if case["name"] in FEW]

    return edited(tmp_path / "few.json", change)


@pytest.fixture
def made(bundle: Callable[[str], Path]) -> Callable[[str], Path]:
    """`made(target)`: the miniature's bundle with its checkpoint in the manifest."""

    def folder(target: str) -> Path:
        of = read_golden(GOLDEN).checkpoint
        files = {name: {"sha256": digest} for name, digest in of.files.items()}
        manifest = {"target": target, "checkpoint": {"config_sha256": of.config_sha256, "files": files}}
        path = bundle(target)
        (path / "manifest.json").write_text(json.dumps(manifest))
        return path

    return folder


def command(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


# --- without a bundle ---


def test_the_shipped_golden_is_small_and_of_the_shipped_cases() -> None:
    assert GOLDEN.stat().st_size < 10**6
    found = read_golden(GOLDEN)
    assert [case.name for case in found.cases] == [case.name for case in read_cases((SUITE,))]
    assert found.checkpoint.config_sha256 == open_checkpoint(MINIATURE).config_digest
    text = GOLDEN.read_text(encoding="utf-8")
    assert str(ROOT) not in text
    assert os.path.expanduser("~") + "/" not in text


def test_samples_are_spread_and_lossless() -> None:
    tensor = np.random.default_rng(0).standard_normal((5, 100), np.float32)
    sample = sampled(tensor, "seed")
    assert sample == sampled(tensor, "seed")
    assert sample.at != sampled(tensor, "another").at
    assert len(sample.at) == record.SAMPLES
    assert {at // 100 for at in sample.at} == {0, 1, 2, 3, 4}
    np.testing.assert_array_equal(floats(sample.values), tensor.reshape(-1)[list(sample.at)].astype(np.float64))
    for value in (0.0, -0.0, 1.0, -1.5, 1e-40, 3.4e38):
        (again,) = floats(record._hex(value))
        assert (again, np.signbit(again)) == (value, np.signbit(value))
    assert sampled(np.zeros((0, 4), np.float32), "seed").at == ()


def test_a_sample_detects_differences() -> None:
    tensor = np.random.default_rng(0).standard_normal((6, 32), np.float32)
    want = sampled(tensor, "seed")
    assert compare_sampled("embeddings", "case", tensor, want).measured == 0
    assert compare_sampled("embeddings", "case", tensor + np.float32(5e-5), want).ok
    assert not compare_sampled("embeddings", "case", tensor + np.float32(2e-4), want).ok
    assert not compare_sampled("embeddings", "case", np.roll(tensor, 1, axis=0), want).ok
    assert not compare_sampled("embeddings", "case", tensor[:5], want).ok
    holed = tensor.copy()
    holed.reshape(-1)[next(at for at in range(192) if at not in want.at)] = np.nan
    assert not compare_sampled("embeddings", "case", holed, want).ok
    one_row = tensor.copy()
    one_row[3] += 1
    gate = compare_sampled("embeddings", "case", one_row, want)
    assert not gate.ok
    assert "at [3, " in gate.detail


STALE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "of a later format": (lambda d: d.update(format=3), "not a golden of this version"),
    "of no format": (lambda d: d.pop("format"), "not a golden of this version"),
    "with an unknown key": (lambda d: d.update(extra=1), "incomplete or malformed: `extra`"),
    "without its cases": (lambda d: d.update(cases=[]), "incomplete or malformed: `cases`"),
    "with a broken case": (lambda d: d["cases"][0].pop("input_ids"), "incomplete or malformed: `cases.0.input_ids`"),
}


@pytest.mark.parametrize(("change", "what"), STALE.values(), ids=STALE.keys())
def test_an_incomplete_golden_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], object], what: str) -> None:
    with pytest.raises(GoldenError) as caught:
        read_golden(edited(tmp_path / "changed.json", change))
    assert what in caught.value.what
    assert "qwen3vl-onnx golden" in str(caught.value.next)


def test_a_truncated_or_missing_golden_is_refused(tmp_path: Path) -> None:
    cut = tmp_path / "cut.json"
    cut.write_bytes(GOLDEN.read_bytes()[:10_000])
    for path, what in ((cut, "incomplete or malformed"), (tmp_path / "absent.json", "cannot be read")):
        with pytest.raises(GoldenError, match=what):
            read_golden(path)


def test_a_verification_needs_something_to_compare_with(tmp_path: Path) -> None:
    code, _, stderr = command(tmp_path)
    assert code == 2
    assert "--golden" in stderr


# --- with the miniature's bundle ---


def report(folder: Path, path: Path, reference: Path | None = None) -> Report:
    return verify.verify_golden(folder, path, (), None if reference is None else open_checkpoint(reference))


@pytest.mark.torch  # to build the bundle
@pytest.mark.parametrize("target", TARGETS)
def test_an_intact_bundle_passes(made: Callable[[str], Path], few: Path, target: str) -> None:
    found = report(made(target), few)
    assert found.ok, shown(found)
    counts = {gate.place: sum(other.place == gate.place for other in found.gates) for gate in found.gates}
    assert counts["decoded image"] == 4
    assert counts["decoder layers"] == 4 * 5
    assert counts["vision layers"] == 3 * 5
    assert counts["deepstack features"] == 9
    assert counts["decoder step"] == 8
    assert counts["tokens"] == 5
    assert ("runtime's pixel values" in counts) == (target == "genai")
    assert "give --reference" in found.not_run["held-out accuracy"]


CONTROLS: tuple[tuple[Mutation, str, str], ...] = (
    (mutations.deepstack_zeroed, "genai", "deepstack features"),
    (mutations.deepstack_zeroed, "onnxruntime", "deepstack features"),
    (mutations.image_features_shifted, "genai", "embeddings"),
    (mutations.image_features_shifted, "onnxruntime", "image features"),
    (mutations.rotary_axes_swapped, "genai", "decoder layers"),
    (mutations.attention_mask_off_by_one, "onnxruntime", "decoder layers"),
    (mutations.mlp_scaled, "genai", "decoder layers"),
    (mutations.layers_swapped, "onnxruntime", "decoder layers"),
    (mutations.mean_changed, "genai", "pixel values"),
    (mutations.newline_lost, "onnxruntime", "token ids"),
)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("mutation", "target", "place"), CONTROLS, ids=[f"{change.__name__}-{target}" for change, target, _ in CONTROLS]
)
def test_a_broken_bundle_fails_at_the_broken_place(
    made: Callable[[str], Path], few: Path, mutation: Mutation, target: str, place: str
) -> None:
    folder = made(target)
    mutation(folder, target)
    found = report(folder, few)
    assert not found.ok
    assert found.first_failure is not None
    assert found.first_failure.place == place, shown(found)


@pytest.mark.torch
def test_another_image_decoder_is_reported(
    made: Callable[[str], Path], few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A JPEG decoder that rounds differently fails its own gate and no other."""

    def other(path: Path) -> Image.Image:
        image = load_image(path)
        return ImageOps.posterize(image, 7) if path.suffix == ".jpg" else image

    monkeypatch.setattr(record, "load_image", other)
    folder = made("genai")
    code, table, stderr = command(folder, "--golden", few)
    assert code == 20
    assert "decoded differently" in stderr
    assert "genai is not at fault: JPEG 4:2:0, photo.jpg" in stderr
    assert "decoded by Pillow" in stderr
    written = json.loads((folder / "evidence" / "golden" / "parity.json").read_text())
    assert written["first difference"].startswith("decoded image: JPEG")
    assert [gate["place"] for gate in written["gates"] if not gate["ok"]] == ["decoded image"]
    assert [gate["place"] for gate in written["gates"] if gate["case"].startswith("JPEG")] == ["decoded image"]
    assert "decoded differently" in written["not run"]["case JPEG 4:2:0"]
    assert "case JPEG 4:2:0: the rest not run: its image is decoded differently" in table

    mutations.deepstack_zeroed(folder, "genai")
    code, _, stderr = command(folder, "--golden", few)
    assert "genai does not equal PyTorch; first difference: deepstack features" in stderr


@pytest.mark.torch
def test_tokens_are_exact_except_for_near_ties(made: Callable[[str], Path], few: Path, tmp_path: Path) -> None:
    def change(lead: str) -> Callable[[dict[str, Any]], None]:
        def edit(document: dict[str, Any]) -> None:
            (text,) = [case for case in document["cases"] if case["name"] == "text"]
            text["tokens"][-1] = (text["tokens"][-1] + 1) % 4000
            text["margins"] = " ".join([*text["margins"].split()[:-1], lead])
            document["cases"] = [case for case in document["cases"] if case["name"] in FEW]

        return edit

    folder = made("onnxruntime")
    clear = report(folder, edited(tmp_path / "clear.json", change("0x1p0")))
    assert clear.first_failure is not None
    assert (clear.first_failure.place, clear.first_failure.measured) == ("tokens", 1)
    tie = report(folder, edited(tmp_path / "tie.json", change("0x0p0")))
    assert [gate.case for gate in tie.gates if not gate.ok] == ["near ties"]


def _other_weights(document: dict[str, Any]) -> None:
    document["checkpoint"]["files"]["model.safetensors"] = "0" * 64


def _other_config(document: dict[str, Any]) -> None:
    document["checkpoint"]["config_sha256"] = "0" * 64


def _other_case(document: dict[str, Any]) -> None:
    document["cases"] = [case for case in document["cases"] if case["name"] in FEW]
    document["cases"][0]["digest"] = "0" * 64


def _more_cases(document: dict[str, Any]) -> None:
    document["cases"] = [case for case in document["cases"] if case["name"] in (*FEW, "palette")]


@pytest.mark.torch
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_other_weights, "another checkpoint than the bundle"),
        (_other_config, "another checkpoint than the bundle"),
        (_other_case, "another case 'one image'"),
        (_more_cases, "other cases: 'palette' is only there"),
    ],
)
def test_a_stale_golden_is_refused(
    made: Callable[[str], Path], tmp_path: Path, change: Callable[[dict[str, Any]], object], what: str
) -> None:
    code, printed, stderr = command(made("genai"), "--golden", edited(tmp_path / "stale.json", change))
    assert (code, printed) == (26, "")
    assert what in stderr
    assert "next:" in stderr


@pytest.mark.torch
def test_a_bundle_without_its_checkpoint_needs_the_reference(
    bundle: Callable[[str], Path], few: Path, checkpoint: Callable[[str], Path]
) -> None:
    folder = bundle("onnxruntime")
    with pytest.raises(GoldenError, match="does not say which checkpoint"):
        report(folder, few)
    with pytest.raises(GoldenError, match="another checkpoint than"):
        report(folder, few, checkpoint("deepstack0"))
    found = report(folder, few, MINIATURE)
    assert found.ok, shown(found)
    assert [gate.case for gate in found.gates if gate.place == "held-out accuracy"] == [
        "41 held-out answers, right: ONNX 36"
    ]


@pytest.mark.torch
def test_a_changed_image_makes_a_golden_stale(
    made: Callable[[str], Path], reference: Reference, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A golden of the user's own cases from the command line, then the same cases with another image."""
    (tmp_path / "own").mkdir()
    Image.new("RGB", (64, 64), (9, 99, 200)).save(tmp_path / "own" / "blue.png")
    cases = tmp_path / "own" / "mine.toml"
    cases.write_text('[[case]]\nname = "mine"\nprompt = "What?"\nimages = ["blue.png"]\nmax_new_tokens = 4\n')
    monkeypatch.setattr(record, "SUITE", tmp_path / "own")
    monkeypatch.setattr(record, "held_out", lambda checkpoint: ())
    arguments = ["golden", str(MINIATURE), "--output", str(tmp_path / "new" / "mine.json")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == arguments[-1]

    document = json.loads((tmp_path / "new" / "mine.json").read_text())
    own = edited(tmp_path / "both.json", lambda d: d["cases"].extend(document["cases"]))
    both = json.loads(own.read_text())
    both["cases"] = [case for case in both["cases"] if case["name"] in (*FEW, "mine")]
    own.write_text(json.dumps(both))
    folder = made("onnxruntime")
    assert command(folder, "--golden", own, "--cases", cases)[0] == 0
    code, _, stderr = command(folder, "--golden", own)
    assert (code, "'mine' is only there" in stderr, "--cases" in stderr) == (26, True, True)
    Image.new("RGB", (64, 64), (9, 99, 201)).save(tmp_path / "own" / "blue.png")
    code, _, stderr = command(folder, "--golden", own, "--cases", cases)
    assert (code, "another case 'mine'" in stderr) == (26, True)


@pytest.mark.torch
def test_a_checkpoint_that_does_not_fit_in_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="complete checkpoint in memory"):
        record.golden_of(open_checkpoint(MINIATURE), tmp_path / "golden.json", memory=10**6)
    with pytest.raises(CheckpointError):
        record.golden_of(open_checkpoint(tmp_path), tmp_path / "golden.json")


def same(got: GoldenCase, want: GoldenCase) -> None:
    """Check that inputs and tokens are equal, and samples equal within the tolerance."""
    for key in ("name", "digest", "images", "input_ids", "position_ids", "pixel_values", "grids", "tokens"):
        assert getattr(got, key) == getattr(want, key), key
    for key in ("vision", "features", "embeddings", "decoder", "logits"):
        for a, b in zip(getattr(got, key), getattr(want, key), strict=True):
            assert a.shape == b.shape
            assert key == "logits" or a.at == b.at
            values = dict(zip(b.at, floats(b.values), strict=True))
            off = [abs(x - values[at]) for at, x in zip(a.at, floats(a.values), strict=True) if at in values]
            assert len(off) >= 0.9 * len(values)
            assert max(off, default=0.0) <= FP32 * (float.fromhex(b.std) or 1.0)


@pytest.mark.torch
@pytest.mark.parametrize("name", FEW)
def test_the_shipped_golden_equals_pytorch(reference: Reference, name: str) -> None:
    (case,) = [case for case in shipped_cases() if case.name == name]
    (want,) = [case for case in read_golden(GOLDEN).cases if case.name == name]
    same(golden_case(case, reference), want)


@pytest.mark.slow
@pytest.mark.torch
def test_a_new_golden_equals_the_shipped_one(tmp_path: Path) -> None:
    done = python("-m", "builder", "golden", "--output", tmp_path / "golden.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    got, want = read_golden(tmp_path / "golden.json"), read_golden(GOLDEN)
    assert (got.checkpoint, got.limits, got.task) == (want.checkpoint, want.limits, want.task)
    for a, b in zip(got.cases, want.cases, strict=True):
        same(a, b)


# --- without torch ---

BLOCKED = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from builder.cli.app import app
app({arguments!r})
"""


@pytest.mark.torch  # to build the bundle
def test_neither_torch_nor_transformers_is_imported(made: Callable[[str], Path], tmp_path: Path) -> None:
    """The complete golden from the command line; the same blocker stops a comparison with the checkpoint."""
    folder = made("genai")
    golden_command = ["verify", str(folder), "--golden", str(GOLDEN), "--reference", str(MINIATURE)]
    done = python("-c", BLOCKED.format(arguments=golden_command), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "FAIL" not in done.stdout
    assert "case more than 10,000 patches: not compared, as its file requests: inputs" in done.stdout
    torch_command = ["verify", str(folder), "--reference", str(MINIATURE)]
    done = python("-c", BLOCKED.format(arguments=torch_command), cwd=tmp_path)
    assert done.returncode != 0
    assert 'pip install "qwen3vl-onnx[build]"' in done.stderr


@pytest.mark.slow
@pytest.mark.torch  # to build the bundle
@pytest.mark.parametrize("target", TARGETS)
def test_a_golden_is_enough_where_the_extra_is_not_installed(
    base: Path,
    made: Callable[[str], Path],
    target: str,
    tmp_path: Path,
) -> None:
    folder = made(target)
    done = without_extra(base, "verify", folder, "--golden", GOLDEN, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    payload = json.loads(done.stdout)
    assert payload["ok"]
    assert {"decoded image", "deepstack features", "tokens"} <= {gate["place"] for gate in payload["gates"]}
