"""The stage `patch`, and what `qwen3vl-onnx patches` shows and records."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import pytest

import patches as own
from builder.stages import patch as stage
from builder.stages.engine.build import Build
from builder.targets.recipe import Attention, Target
from builder.targets.recipe_file import load_recipe
from builder.util.errors import OutputError, PatchError
from patches import verified
from patches.registry import Patch, digest
from tests.helpers.toy_upstream import FIRST, LAYER, PACKAGE, RENAMED, SECOND, Toy, model, patch, toy

__all__ = ["toy"]


@pytest.fixture
def file(toy: Toy, tmp_path: Path) -> Path:
    """Release 1.0.0 installed and LAYER recorded on it."""
    toy.install("1.0.0", FIRST)
    file = tmp_path / "verified.toml"
    assert [recorded.new for recorded in stage.record([LAYER], file)] == [True]
    return file


def wrong(original: Any) -> Any:
    """A replacement that does not equal upstream."""
    return lambda self, x, scale=2: scale * x + 2


def checked(one: Patch) -> Patch:
    """The patch with a check that applies this patch."""
    from patches.registry import applied

    def check() -> None:
        wanted = model().Layer().forward(3)
        with applied([changed]):
            got = model().Layer().forward(3)
        assert got == wanted, f"layer: {got}, expected {wanted}"

    changed = replace(one, check=check)
    return changed


def test_status_is_verified_unknown_or_missing(file: Path, toy: Toy) -> None:
    (state,) = stage.status([LAYER], file)
    assert (state.state, state.release, state.verified, state.digest) == (
        "verified",
        "1.0.0",
        ("1.0.0",),
        digest(LAYER),
    )
    assert (state.name, state.target, state.why, state.remove_when) == (
        LAYER.name,
        LAYER.target,
        LAYER.why,
        LAYER.remove_when,
    )
    toy.install("2.0.0", SECOND)
    assert [status.state for status in stage.status([LAYER], file)] == ["unknown"]
    toy.install("3.0.0", RENAMED)
    (state,) = stage.status([LAYER], file)
    assert (state.state, state.digest, state.release) == ("missing", "", "3.0.0")


def test_the_diff_goes_from_upstream_to_the_replacement(file: Path, toy: Toy) -> None:
    text = stage.diff_text(LAYER, file)
    head = f"--- {PACKAGE} 1.0.0 {LAYER.target}\n+++ tests/helpers/toy_upstream.py\n"
    assert text.startswith(f"layer: {LAYER.why}\nremove when: {LAYER.remove_when}\n\n{head}")
    assert "-    y = x * scale\n" in text
    assert "+    return scale * x + model().offset()" in text
    toy.install("2.0.0", SECOND)
    text = stage.diff_text(LAYER, file)
    assert "upstream since it was verified:" in text
    assert "+    y = scale * x\n" in text.partition(f"--- {PACKAGE} 2.0.0")[0]


def test_record_adds_a_release_after_its_check_and_keeps_the_others(file: Path, toy: Toy) -> None:
    first = digest(LAYER)
    toy.install("2.0.0", SECOND)
    (recorded,) = stage.record([LAYER], file)
    assert (recorded.name, recorded.release, recorded.digest, recorded.new) == ("layer", "2.0.0", digest(LAYER), True)
    data = verified.read(file)
    assert data.digests == {"layer": {"1.0.0": first, "2.0.0": digest(LAYER)}}
    assert set(data.lines) == {"1.0.0", "2.0.0"}
    assert [status.state for status in stage.status([LAYER], file)] == ["verified"]


def test_recording_again_checks_again_and_leaves_the_bytes(file: Path) -> None:
    before, ran = file.read_bytes(), []
    watched = patch(check=lambda: ran.append(1))
    assert [recorded.new for recorded in stage.record([watched], file)] == [False]
    assert (file.read_bytes(), ran) == (before, [1])


def test_a_known_source_under_a_new_release_is_written_down(file: Path, toy: Toy) -> None:
    toy.install("1.9.0", FIRST)
    assert [recorded.new for recorded in stage.record([LAYER], file)] == [False]
    assert verified.read(file).releases("layer") == ("1.0.0", "1.9.0")


@pytest.mark.parametrize("release", ["1.0.0", "2.0.0"])
def test_a_failed_check_records_nothing_and_gives_the_figures(file: Path, toy: Toy, release: str) -> None:
    if release == "2.0.0":
        toy.install(release, SECOND)
    before = file.read_bytes()
    bad = checked(patch(make=wrong, name="bad"))
    with pytest.raises(PatchError, match=f"{PACKAGE} {release}, bad failed") as caught:
        stage.record([LAYER, bad], file)
    assert "AssertionError: layer: 8, expected 7" in str(caught.value.found)
    assert file.read_bytes() == before


def test_a_check_that_raises_anything_is_a_failed_check(file: Path, toy: Toy) -> None:
    toy.install("2.0.0", RENAMED)
    with pytest.raises(PatchError, match="layer failed") as caught:
        stage.record([LAYER], file)
    assert "has no toy_upstream.model:Layer.forward" in str(caught.value.found)
    toy.install("3.0.0", FIRST.replace("def forward(self, x, scale=2)", "def forward(self, x, scale)"))
    with pytest.raises(PatchError, match="layer failed") as caught:
        stage.record([LAYER], file)
    assert "TypeError" in str(caught.value.found)


def test_a_patch_that_its_check_never_runs_is_not_recorded(file: Path) -> None:
    from patches.registry import applied

    def check() -> None:
        with applied([LAYER]):
            pass

    with pytest.raises(PatchError, match="idle failed") as caught:
        stage.record([patch(name="idle", check=check)], file)
    assert "installed and never ran" in str(caught.value.found)


def test_record_drops_removed_patches_and_digests_that_cannot_match(file: Path, toy: Toy) -> None:
    toy.install("2.0.0", SECOND)
    wider = patch(covers=(*LAYER.covers, f"{PACKAGE}.model:apply"))
    stage.record([wider], file)
    assert verified.read(file).releases("layer") == ("2.0.0",)
    stage.record([patch(name="other")], file)
    data = verified.read(file)
    assert set(data.digests) == {"other"}
    assert set(data.lines["2.0.0"]) == set(LAYER.functions)


def test_record_into_a_folder_that_cannot_be_written_is_an_output_error(toy: Toy, tmp_path: Path) -> None:
    toy.install("1.0.0", FIRST)
    with pytest.raises(OutputError):
        stage.record([LAYER], tmp_path / "absent" / "verified.toml")


def test_record_refuses_to_run_without_assertions() -> None:
    code = "from builder.stages.patch import record; record(())"
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "PatchError: the checks are assertions" in done.stderr


def build(tmp_path: Path, *attentions: str) -> Build:
    """A build whose recipe has one target per attention; the stage reads nothing else."""
    targets = tuple(Target("genai", cast(Attention, attention)) for attention in attentions)
    return Build(cast(Any, None), replace(load_recipe(), targets=targets), tmp_path)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("attentions", "needed"),
    [
        (("eager",), set(own.SETS["eager"])),
        (("fused",), set(own.SETS["fused"])),
        (("fused", "eager", "fused"), set(own.SETS["eager"]) | set(own.SETS["fused"])),
    ],
)
def test_the_stage_leaves_a_diff_a_patch_and_the_facts(
    tmp_path: Path, attentions: tuple[str, ...], needed: set[str]
) -> None:
    facts = stage.run(build(tmp_path, *attentions), tmp_path)
    assert set(facts["patches"]) == needed
    assert json.loads(json.dumps(facts)) == json.loads((tmp_path / "patches.json").read_text())
    assert {file.stem for file in tmp_path.glob("*.diff")} == needed
    for name, fact in facts["patches"].items():
        one = own.patch(name)
        assert fact["release"] == version("transformers")
        assert fact["digest"] in verified.read().digests[name].values()
        assert (fact["target"], fact["why"], fact["remove_when"]) == (one.target, one.why, one.remove_when)
        diff = (tmp_path / f"{name}.diff").read_text()
        assert diff == stage.diff_text(name)
        assert f"--- transformers {version('transformers')} {one.target}\n+++ patches/{name}.py\n@@ -1," in diff
        assert str(Path(stage.__file__).parent) not in diff


@pytest.mark.torch
def test_the_stage_writes_the_same_bytes_again(tmp_path: Path) -> None:
    out = [tmp_path / "one", tmp_path / "two"]
    for folder in out:
        folder.mkdir()
        stage.run(build(tmp_path, "fused", "eager"), folder)
    one, two = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in out)
    assert one == two


@pytest.mark.torch
def test_the_stage_stops_at_a_source_that_was_never_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patches = own.all_patches()
    strange = replace(own.patch("text_rotary"), target="transformers.vision_utils:get_vision_cu_seqlens")
    monkeypatch.setattr(
        own, "all_patches", lambda: tuple(strange if each.name == strange.name else each for each in patches)
    )
    with pytest.raises(PatchError, match="text_rotary: not verified"):
        stage.run(build(tmp_path, "eager"), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.torch
def test_every_equivalence_check_passes_and_the_record_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "verified.toml"
    file.write_bytes(verified.FILE.read_bytes())
    assert all(not recorded.new for recorded in stage.record(file=file))
    assert file.read_bytes() == verified.FILE.read_bytes()
