"""Recipes are read strictly: every key is used, and everything else is rejected by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.targets.graphs import GRAPHS
from builder.targets.recipe import Recipe, Target
from builder.targets.recipe_file import load_recipe, shipped
from builder.util.errors import RecipeError

BOTH = 'precision = "fp32"\ntargets = ["genai", "onnxruntime"]\n'
GENAI = 'precision = "fp32"\ntargets = ["genai"]\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mine.toml"


def rejected(file: Path, text: str) -> RecipeError:
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert str(file) in caught.value.what
    return caught.value


def test_the_default_recipe_has_each_target_with_its_own_attention() -> None:
    assert load_recipe() == Recipe(
        name="fp32",
        precision="fp32",
        targets=(Target("genai", "fused"), Target("onnxruntime", "eager")),
        max_length=4096,
    )


def test_shipped_recipes_load() -> None:
    own = ["fp16", "fp32", "fp32-eager", "int4", "int4-fast", "int4-small", "int8"]
    others = [f"{name}-{provider}" for name in ("fp16", "int4") for provider in ("dml", "webgpu")]
    assert shipped() == sorted([*own, *others, "bf16", "fp32-everywhere", "int4-cuda", "int4-openvino"])
    assert [load_recipe(name).name for name in shipped()] == shipped()
    assert [name for name in shipped() if load_recipe(name).exact] == ["fp32", "fp32-eager", "fp32-everywhere"]
    assert [target.runtime for target in load_recipe("fp32-everywhere").targets] == list(GRAPHS)
    assert load_recipe("fp32-eager").targets == (Target("genai", "eager"),)


def test_a_recipe_is_named_after_its_file_and_keeps_the_order_of_targets(file: Path) -> None:
    file.write_text('precision = "fp32"\ntargets = ["onnxruntime", "genai"]\nmax_length = 512\n', encoding="utf-8")
    recipe = load_recipe(str(file))
    assert recipe.name == "mine"
    assert [target.runtime for target in recipe.targets] == ["onnxruntime", "genai"]
    assert recipe.max_length == 512


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        ('"eager"', {"genai": "eager", "onnxruntime": "eager"}),
        ('{ genai = "eager" }', {"genai": "eager", "onnxruntime": "eager"}),
        ('{ genai = "fused" }', {"genai": "fused", "onnxruntime": "eager"}),
        ("{}", {"genai": "fused", "onnxruntime": "eager"}),
    ],
)
def test_attention_is_for_all_targets_or_for_those_in_a_table(
    file: Path, attention: str, expected: dict[str, str]
) -> None:
    file.write_text(f"{BOTH}attention = {attention}\n", encoding="utf-8")
    assert {target.runtime: target.attention for target in load_recipe(file).targets} == expected


@pytest.mark.parametrize("attention", ['"fused"', '{ onnxruntime = "fused" }'])
def test_fused_attention_on_onnxruntime_is_rejected(file: Path, attention: str) -> None:
    error = rejected(file, f"{BOTH}attention = {attention}\n")
    assert "onnxruntime" in error.what
    assert "table" in str(error.next)


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        (BOTH + "max_lenght = 3", "max_lenght", "max_length"),
        (BOTH + 'Precision = "fp32"', "Precision", "precision"),
        (BOTH + 'attention = { gena = "eager" }', "attention.gena", "genai"),
        ('precision = "fp31"\ntarget = ["genai"]', "target", "targets"),
    ],
)
def test_an_unknown_key_comes_with_the_nearest_spelling(file: Path, text: str, key: str, near: str) -> None:
    error = rejected(file, text)
    assert f"unknown key `{key}`" in error.what
    assert near in str(error.next)
    assert near in str(error.expected)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (BOTH + "max_length = 0", "max_length"),
        (BOTH + "max_length = true", "max_length"),
        (BOTH + 'max_length = "4"', "max_length"),
        (BOTH + "max_length = 4.0", "max_length"),
        (BOTH + 'attention = "flash"', "attention"),
        (BOTH + "attention = 3", "attention"),
        (GENAI + 'attention = { onnxruntime = "eager" }', "attention.onnxruntime"),
        ('precision = "int3"\ntargets = ["genai"]', "precision"),
        ('targets = ["genai"]', "precision"),
        ('precision = "fp32"', "targets"),
        ('precision = "fp32"\ntargets = []', "targets"),
        ('precision = "fp32"\ntargets = "genai"', "targets"),
        ('precision = "fp32"\ntargets = ["genai", "genai"]', "targets"),
        ('precision = "fp32"\ntargets = ["vllm"]', "targets.0"),
    ],
)
def test_a_wrong_value_is_rejected_by_key(file: Path, text: str, named: str) -> None:
    assert f"`{named}" in rejected(file, text).what


@pytest.mark.parametrize("text", ["precision =", "\x00", 'precision = "fp32"\nprecision = "fp32"'])
def test_invalid_toml_is_rejected(file: Path, text: str) -> None:
    assert rejected(file, text).expected == "TOML 1.0 in UTF-8"


def test_missing_and_binary_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(tmp_path / "absent.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(tmp_path / "bytes.toml")


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match=r"one of: .*fp32, fp32-eager, ") as caught:
        load_recipe("fp32-eagre")
    assert caught.value.next == "--recipe fp32-eager"
