"""The registry with a toy upstream package: digests, installing, restoring, and every error."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import patches as own
from builder.util.errors import PatchError
from patches import source, verified
from patches.registry import applied, digest, drift, require_verified, reverifying
from tests.helpers.toy_upstream import FIRST, LAYER, PACKAGE, RENAMED, SECOND, Toy, model, patch, toy

__all__ = ["toy"]


@pytest.fixture
def file(toy: Toy, tmp_path: Path) -> Path:
    """Release 1.0.0 installed, and a file that records that LAYER was verified on it."""
    toy.install("1.0.0", FIRST)
    file = tmp_path / "verified.toml"
    lines = {name: source.line_digests(source.text(name)) for name in LAYER.functions}
    verified.write(verified.Verified({"layer": {"1.0.0": digest(LAYER)}}, {"1.0.0": lines}), file)
    return file


def test_applied_replaces_counts_and_restores(file: Path) -> None:
    layer = model().Layer
    before = vars(layer)["forward"]
    with applied([LAYER], file) as calls:
        assert vars(layer)["forward"] is not before
        assert str(inspect.signature(layer.forward)) == "(self: 'Any', x: 'int', scale: 'int' = 2) -> 'int'"
        assert [layer().forward(3), layer().forward(3, scale=4)] == [7, 13]
        assert calls == {"layer": 2}
    assert vars(layer)["forward"] is before


def test_the_replacement_receives_upstreams_function(file: Path) -> None:
    got: list[Any] = []

    def make(original: Any) -> Any:
        got.append(original)
        return lambda *args: original(*args) * 100

    before = model().Layer.forward
    with applied([patch(make=make)], file):
        assert model().Layer().forward(3) == 700
    assert got == [before]


def test_applied_restores_after_an_exception_and_raises_no_other(file: Path) -> None:
    before = vars(model().Layer)["forward"]
    with pytest.raises(ZeroDivisionError), applied([LAYER], file):
        raise ZeroDivisionError
    assert vars(model().Layer)["forward"] is before


def test_applied_restores_what_was_installed_before_a_patch_that_cannot_be_made(file: Path) -> None:
    def broken(original: Any) -> Any:
        raise RuntimeError("cannot be made")

    first = patch(name="first", target=f"{PACKAGE}.model:Layer.fixed", covers=())
    second = patch(name="second", target=f"{PACKAGE}.model:offset", covers=(), make=broken)
    before = dict(vars(model().Layer))
    with reverifying(), pytest.raises(RuntimeError, match="cannot be made"), applied([first, second], file):
        raise AssertionError("the block must not run")
    assert dict(vars(model().Layer)) == before


def test_nested_use_restores_level_by_level_and_checks_upstreams_source(file: Path) -> None:
    layer = model().Layer
    before = vars(layer)["forward"]
    with applied([LAYER], file) as outer:
        between = vars(layer)["forward"]
        with applied([LAYER], file) as inner:
            assert layer().forward(3) == 7
        assert vars(layer)["forward"] is between
        assert layer().forward(3) == 7
    assert (outer, inner) == ({"layer": 1}, {"layer": 1})
    assert vars(layer)["forward"] is before


def test_a_patch_that_never_ran_is_an_error_that_names_it(file: Path) -> None:
    before = vars(model().Layer)["forward"]
    with pytest.raises(PatchError, match="installed and never ran: layer") as caught, applied([LAYER], file):
        pass
    assert "Layer.forward" in str(caught.value)
    assert vars(model().Layer)["forward"] is before


def test_functions_static_and_inherited_methods_keep_their_kind(file: Path) -> None:
    def made(original: Any) -> Any:
        return lambda *args: ("patched", *args[-1:])

    targets = ("apply", "Layer.fixed", "Layer.inherited")
    three = [patch(name=name, target=f"{PACKAGE}.model:{name}", make=made) for name in targets]
    module = model()
    with reverifying(), applied(three):
        assert module.apply(1) == module.Layer().fixed(1) == module.Layer.fixed(1) == ("patched", 1)
        assert module.Layer().inherited(1) == ("patched", 1)
        assert module.Base().inherited(1) == 0
    assert (module.apply(1), module.Layer().fixed(1), module.Layer().inherited(1)) == (3, 6, 0)
    assert "inherited" not in vars(module.Layer)


def test_two_patches_of_one_target_are_refused(file: Path) -> None:
    with (
        pytest.raises(PatchError, match="layer and other both replace"),
        applied([LAYER, patch(name="other")], file),
    ):
        raise AssertionError("the block must not run")


def test_an_unknown_source_names_everything_and_shows_what_differs(file: Path, toy: Toy) -> None:
    toy.install("2.0.0", SECOND)
    before = vars(model().Layer)["forward"]
    with pytest.raises(PatchError) as caught, applied([LAYER], file):
        raise AssertionError("the block must not run")
    message = str(caught.value)
    for part in ("layer", LAYER.target, f"{PACKAGE} 2.0.0", "1.0.0", digest(LAYER)):
        assert part in message
    removed = source.line_digests("    y = x * scale")
    assert f"-«line 4 removed ({removed})»\n+    y = scale * x\n+    y = y + 0\n     return y + offset()" in message
    assert "patches --diff" in str(caught.value.next)
    assert "patches --record" in str(caught.value.next)
    assert "x * scale" not in file.read_text()
    assert vars(model().Layer)["forward"] is before


def test_a_release_with_the_same_source_needs_no_record(file: Path, toy: Toy) -> None:
    toy.install("1.9.0", FIRST)
    require_verified([LAYER], file)
    with applied([LAYER], file):
        assert model().Layer().forward(1) == 3


def test_every_unverified_patch_is_in_one_error(file: Path, toy: Toy) -> None:
    toy.install("2.0.0", SECOND)
    with pytest.raises(PatchError, match="layer, other: not verified") as caught:
        require_verified([LAYER, patch(name="other")], file)
    assert "no release was ever recorded" in str(caught.value)


def test_changed_covers_are_reported_as_the_reason(file: Path) -> None:
    fewer = patch(covers=())
    with pytest.raises(PatchError, match="the set of functions that the digest covers has changed since"):
        require_verified([fewer], file)
    more = patch(covers=(*LAYER.covers, f"{PACKAGE}.model:apply"))
    assert "+    return Layer().forward(x)" in drift(more, file)


def test_a_missing_target_is_an_error(file: Path, toy: Toy) -> None:
    toy.install("2.0.0", RENAMED)
    message = r"layer: toy_upstream 2\.0\.0 has no toy_upstream\.model:Layer\.forward"
    with pytest.raises(PatchError, match=message) as caught:
        require_verified([LAYER], file)
    assert "1.0.0" in str(caught.value.expected)
    with reverifying(), pytest.raises(PatchError, match=message), applied([LAYER], file):
        raise AssertionError("the block must not run")


@pytest.mark.torch
def test_every_patch_is_found_by_its_modules_name() -> None:
    for module_patch in own.all_patches():
        assert own.patch(module_patch.name) is module_patch
        assert module_patch.make.__module__ == f"patches.{module_patch.name}"
    with pytest.raises(PatchError, match="no patch is named 'text_rotory'") as caught:
        own.patch("text_rotory")
    assert "text_rotary" in str(caught.value.next)


@pytest.mark.torch
@pytest.mark.parametrize("name", sorted({name for names in own.SETS.values() for name in names}))
def test_every_check_fails_when_the_replacement_is_a_thousandth_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch.utils import _pytree as pytree

    def off(original: Any) -> Any:
        replacement = tested.make(original)
        return lambda *args, **kwargs: pytree.tree_map_only(
            torch.Tensor, lambda x: x * 1.001, replacement(*args, **kwargs)
        )

    tested = own.patch(name)
    tested.check()
    monkeypatch.setattr(f"patches.{name}.PATCH", replace(tested, make=off))
    with pytest.raises(AssertionError, match="of a standard deviation, at most"):
        tested.check()


@pytest.mark.torch
def test_every_patch_belongs_to_a_set_and_no_set_patches_a_target_twice() -> None:
    assert {name for names in own.SETS.values() for name in names} == {each.name for each in own.all_patches()}
    for attention, names in own.SETS.items():
        chosen = own.patches_for(attention)
        assert tuple(each.name for each in chosen) == names
        assert len({each.target for each in chosen}) == len(chosen)
    with pytest.raises(PatchError, match="flash"):
        own.patches_for("flash")


@pytest.mark.torch
def test_a_patched_module_exports_and_the_trace_counts_as_a_run(file: Path, toy: Toy) -> None:
    import torch

    toy.install(
        "3.0.0",
        "import torch\n\n\nclass Layer(torch.nn.Module):\n    def forward(self, x):\n        return x\n",
    )
    double = patch(covers=(), make=lambda original: lambda self, x, *, scale=2: x * scale)
    with reverifying(), applied([double]) as calls:
        dynamic = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(model().Layer(), (torch.ones(2, 3),), dynamic_shapes=dynamic)
    assert calls == {"layer": 1}
    assert torch.equal(program.module()(torch.ones(5, 3)), torch.full((5, 3), 2.0))
