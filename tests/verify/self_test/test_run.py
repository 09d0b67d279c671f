"""Test the self-test: every mutant is caught at its place, and misses are reported."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from builder.checkpoint.load import open_checkpoint
from builder.checkpoint.parts import DECODER
from builder.cli.app import app
from builder.targets.graphs import GRAPHS
from builder.util.files import sha256
from builder.verify.report.gates import PLACES, Gate
from builder.verify.self_test import mutations, run
from builder.verify.self_test.edits import edit_json
from builder.verify.self_test.mutants import MUTANTS, Mutant
from builder.verify.self_test.thresholds import DECADES, Threshold, find_threshold
from tests.helpers.checkpoints import MINIATURE
from tests.helpers.shown import shown

pytestmark = pytest.mark.torch

INAPPLICABLE = {"genai": {"causal mask", "preprocessor"}, "onnxruntime": {"image token"}}
QUANTIZATION = {"scales shifted", "zero points", "nibbles swapped"}  # only in lossy bundles
INT8 = {"int8 activations"}  # only in int4-fast
TOLERANT = {"vision layers", "image features", "deepstack features", "embeddings", "decoder layers", "decoder prefill"}


@pytest.fixture
def _no_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the mutants only."""
    monkeypatch.setattr(run, "sites", lambda *_: ())


def digests(folder: Path) -> Mapping[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}


def nothing(bundle: Path, target: str) -> None:
    """Change nothing."""


def only(name: str, /, **changes: Any) -> Mutant:
    (mutant,) = [mutant for mutant in MUTANTS if mutant.name == name]
    return Mutant(**{**vars(mutant), **changes})


@pytest.mark.parametrize("target", ["genai", "onnxruntime"])
def test_every_mutant_is_caught_where_it_is(bundle: Callable[[str], Path], target: str) -> None:
    folder = bundle(target)
    before = digests(folder)
    done = run.self_test(folder, open_checkpoint(MINIATURE))
    assert done.ok, shown(done)
    none = INAPPLICABLE[target] | QUANTIZATION | INT8
    assert {catch.mutant.name for catch in done.catches if catch.status == "does not apply"} == none
    assert [catch.mutant for catch in done.catches] == list(MUTANTS)
    assert {threshold.place for threshold in done.thresholds} == TOLERANT
    assert sum(threshold.place == "deepstack features" for threshold in done.thresholds) == 3
    for threshold in done.thresholds:
        assert threshold.fails is not None, shown(done)
        assert 1e-6 < threshold.passes < threshold.fails < 1e-2, shown(done)

    assert digests(folder) == before
    assert {path.name for path in (folder / "evidence").iterdir()} == {"self_test.json", "self_test.txt"}
    assert json.loads((folder / "evidence" / "self_test.json").read_text()) == done.as_dict()
    text = (folder / "evidence" / "self_test.txt").read_text()
    assert all(re.search(rf"(?m)^ {re.escape(mutant.name)} {{2,}}\S", text) for mutant in MUTANTS)
    assert done.markdown().count("| caught |") == len(MUTANTS) - len(none)


# One of each kind: settings, vision encoder, decoder, stored weights, quantized weights.
FEW = QUANTIZATION | {"newline lost", "DeepStack swapped", "MLP scaled", "layers swapped"}
STORED = QUANTIZATION | {"layers swapped", "weight transposed"}


@pytest.mark.usefixtures("_no_thresholds")
def test_mutants_of_a_quantized_bundle_are_caught_through_its_fp32_copy(lossy: Callable[[str], Path]) -> None:
    check_lossy(lossy("int4"), tuple(mutant for mutant in MUTANTS if mutant.name in FEW))


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "lacks"), [("int4", INT8), ("int4-fast", set()), ("fp16", QUANTIZATION | INT8)])
def test_every_mutant_of_a_lossy_bundle_is_caught_where_it_is(
    lossy: Callable[[str], Path], recipe: str, lacks: set[str]
) -> None:
    done = check_lossy(lossy(recipe), MUTANTS)
    none = {catch.mutant.name for catch in done.catches if catch.status == "does not apply"}
    assert none == INAPPLICABLE["genai"] | lacks
    assert {threshold.place for threshold in done.thresholds} == TOLERANT


def check_lossy(folder: Path, mutants: tuple[Mutant, ...]) -> run.SelfTest:
    """Mutants of quantized weights are caught at `weights`, all others at their own places."""
    before = digests(folder)
    done = run.self_test(folder, open_checkpoint(MINIATURE), mutants=mutants)
    assert done.ok, shown(done)
    for catch in done.catches:
        if catch.mutant.name in QUANTIZATION and catch.status == "caught":
            assert catch.first is not None
            assert catch.first.place == "weights", shown(done)
        elif catch.mutant.name not in STORED and catch.status == "caught":
            assert catch.first is not None
            assert catch.first.place in catch.mutant.places["genai"], shown(done)
    assert digests(folder) == before
    return done


def test_mutants_have_unique_names_and_valid_places() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        assert set(mutant.places) == set(GRAPHS)
        assert all(places and places <= set(PLACES) for places in mutant.places.values())


@pytest.mark.usefixtures("_no_thresholds")
def test_a_missed_or_misplaced_mutant_exits_with_20(
    bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = (
        only("norm epsilon", name="nothing", change=nothing),
        only("newline lost", name="elsewhere", places={"genai": frozenset({"pixel values"})}),
        only("MLP scaled", name="another layer", at="layer 1"),
        only("newline lost"),
    )
    monkeypatch.setattr(run, "MUTANTS", wrong)
    folder = bundle("genai")
    command = ["verify", str(folder), "--reference", str(MINIATURE), "--self-test"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 20, done.output
    assert "nothing (not caught); elsewhere (wrong place); another layer (wrong place)" in done.stderr
    assert "newline lost (" not in done.stderr
    as_json = CliRunner().invoke(app, [*command, "--json"])
    assert as_json.exit_code == 20
    found = json.loads(as_json.stdout)
    assert (found["ok"], found["verdict"]) == (False, "failed")
    assert [mutant["status"] for mutant in found["mutants"]] == ["not caught", "wrong place", "wrong place", "caught"]
    assert "NOT CAUGHT" in done.stdout


@pytest.mark.usefixtures("_no_thresholds")
def test_a_bundle_that_fails_itself_proves_nothing(bundle: Callable[[str], Path]) -> None:
    folder = bundle("onnxruntime")
    mutations.newline_lost(folder, "onnxruntime")
    done = run.self_test(folder, open_checkpoint(MINIATURE))
    assert not done.ok
    assert done.catches == ()
    assert "the bundle itself fails: token ids, one image" in str(run.failed(done, folder))


@pytest.mark.usefixtures("_no_thresholds")
def test_a_mutant_that_does_not_load_proves_nothing(bundle: Callable[[str], Path]) -> None:
    def spoil(folder: Path, target: str) -> None:
        edit_json(folder / "pipeline.json", lambda settings: settings.pop("image_token"))

    done = run.self_test(bundle("genai"), open_checkpoint(MINIATURE), mutants=(only("newline lost", change=spoil),))
    assert [catch.status for catch in done.catches] == ["refused"]
    assert "image_token" in done.catches[0].refused
    assert not done.ok


def test_without_an_applicable_mutant_the_self_test_fails(
    bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "sites", lambda *_: ())
    done = run.self_test(bundle("genai"), open_checkpoint(MINIATURE), mutants=(only("causal mask"),))
    assert [catch.status for catch in done.catches] == ["does not apply"]
    assert not done.ok
    assert "no mutant applies" in str(run.failed(done, Path("evidence")))


@pytest.mark.slow
def test_the_layerwise_comparison_is_tested_in_the_same_way(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    folder = bundle("genai")
    few = (only("newline lost"), only("MLP scaled"))
    done = run.self_test(folder, open_checkpoint(MINIATURE), memory=10**6, store=tmp_path / "store", mutants=few)
    assert [catch.status for catch in done.catches] == ["caught", "caught"], shown(done)
    assert {threshold.place for threshold in done.thresholds} == TOLERANT
    assert list((tmp_path / "store").iterdir())


def test_a_self_test_needs_the_checkpoint(bundle: Callable[[str], Path]) -> None:
    done = CliRunner().invoke(app, ["verify", str(bundle("genai")), "--self-test"])
    assert done.exit_code == 2
    assert "--reference" in done.stderr


def test_an_edit_that_changes_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="is unchanged"):
        edit_json(tmp_path / "a.json", lambda document: document.update(a=1))


def test_a_transposed_weight_has_the_same_values(bundle: Callable[[str], Path]) -> None:
    folder = bundle("onnxruntime")
    before = matrix(folder)
    mutations.weight_transposed(folder, "onnxruntime")
    after = matrix(folder)
    np.testing.assert_array_equal(after.ravel(), before.T.ravel())
    assert not np.array_equal(after, before)


def matrix(folder: Path) -> np.ndarray:
    model = onnx.load(folder / f"{DECODER}.onnx", load_external_data=False)
    (found,) = [x for x in model.graph.initializer if x.name.endswith("layers.1.self_attn.o_proj.weight")]
    if not found.external_data:
        return onnx.numpy_helper.to_array(found)
    at = {entry.key: entry.value for entry in found.external_data}
    flat = np.fromfile(folder / at["location"], np.float32, int(np.prod(found.dims)), offset=int(at["offset"]))
    return flat.reshape(found.dims)


@pytest.mark.parametrize("limit", [3e-5, 1e-7, 0.2, 9.9e-4])
def test_the_threshold_is_found_to_a_tenth_of_a_decade(limit: float) -> None:
    def passes(errors: Sequence[float]) -> list[bool]:
        return [error <= limit for error in errors]

    passing, failing = find_threshold(passes)
    assert failing is not None
    assert passing <= limit < failing <= passing * 10**0.1 * 1.001


def test_a_gate_that_never_fails_and_one_that_always_does_are_shown() -> None:
    assert find_threshold(lambda errors: [True] * len(errors)) == (1.0, None)
    assert find_threshold(lambda errors: [False] * len(errors)) == (0.0, DECADES[0])


@pytest.mark.usefixtures("_no_thresholds")
def test_a_gate_that_passes_a_doubled_value_fails_the_self_test(
    bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "sites", lambda *_: ("any",))
    monkeypatch.setattr(run, "measure_threshold", lambda *_: Threshold("embeddings", "inputs_embeds", 1.0, None))
    done = run.self_test(bundle("genai"), open_checkpoint(MINIATURE), mutants=(only("newline lost"),))
    assert not done.ok
    assert "embeddings passes with inputs_embeds doubled" in str(run.failed(done, Path("evidence")))
    assert "NONE UP TO 1" in shown(done)


def test_a_mutant_is_explained_by_its_place_and_its_layer() -> None:
    mutant = only("MLP scaled")
    right = Gate("decoder layers", "one image, tokens 0–77, layer 3", 1.0, 1e-4, layer=3)
    assert mutant.explains("genai", right)
    assert not mutant.explains("genai", Gate("decoder layers", "one image, tokens 0–77, layer 2", 1.0, 1e-4, layer=2))
    assert not mutant.explains("genai", Gate("decoder prefill", "one image, layer 3", 1.0, 1e-4, layer=3))
    assert not mutant.explains("genai", None)
