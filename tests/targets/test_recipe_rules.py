"""Rules, limits, the provider and `like` in recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builder.quantization.rules import Rule
from builder.stages.engine.cache_key import plain
from builder.targets.recipe import Limits
from builder.targets.recipe_file import SHIPPED, load_recipe, shipped
from builder.util.errors import RecipeError

LIMITS = "[limits]\n" + "\n".join(
    ["weight = 0.2", "kl_mean = 0.1", "kl_p99 = 1", "same_top = 0.9", "perplexity = 1.2", "task_lost = 1", "lead = 2.0"]
)
HEAD = 'precision = "fp32"\ntargets = ["genai"]\n'
RULE = '[[rules]]\nweights = ["model.visual.*"]\nstore = "int8"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mine.toml"


def rejected(file: Path, text: str) -> RecipeError:
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert str(file) in caught.value.what
    return caught.value


def test_rules_and_limits_are_read_with_every_default_filled_in(file: Path) -> None:
    second = (
        '[[rules]]\nweights = ["*"]\nstore = "int4"\nblock = 128\nzero_points = true\nsearch = "gptq"\naccuracy = 1\n'
    )
    file.write_text(HEAD + RULE + second + LIMITS, encoding="utf-8")
    recipe = load_recipe(file)
    assert recipe.rules == (
        Rule(("model.visual.*",), "int8", 32, False, "mse", 4),
        Rule(("*",), "int4", 128, True, "gptq", 1),
    )
    assert recipe.limits == Limits(0.2, 0.1, 1.0, 0.9, 1.2, 1, 2.0)
    assert recipe.provider == "cpu"
    assert not recipe.exact


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        (HEAD + RULE + "zero_point = true\n" + LIMITS, "rules.0.zero_point", "zero_points"),
        (HEAD + RULE + RULE + "serach = 'mse'\n" + LIMITS, "rules.1.serach", "search"),
        (HEAD + RULE + LIMITS + "\nkl_p90 = 1.0", "limits.kl_p90", "kl_p99"),
        (HEAD + "providers = 'cpu'\n" + RULE + LIMITS, "providers", "provider"),
        (HEAD + RULE + LIMITS.replace("limits", "limit"), "limit", "limits"),
    ],
)
def test_an_unknown_key_comes_with_the_nearest_spelling(file: Path, text: str, key: str, near: str) -> None:
    error = rejected(file, text)
    assert f"unknown key `{key}`" in error.what
    assert error.next == f"did you mean `{near}`?"
    assert near in str(error.expected).removeprefix("one of: ").split(", ")


@pytest.mark.parametrize("block", ["48", "8", "0", "-32", "512", "33", "32.0", "true", '"32"'])
def test_a_block_is_a_supported_power_of_two(file: Path, block: str) -> None:
    error = rejected(file, f"{HEAD}{RULE}block = {block}\n{LIMITS}")
    assert "`rules.0.block` is invalid" in error.what
    if block.isdigit():
        assert "a power of two from 16 to 256" in str(error.expected)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("weights = []", "rules.1.weights"),
        ('weights = "*"', "rules.1.weights"),
        ('weights = ["*"]\nstore = "int3"', "rules.1.store"),
        ('weights = ["*"]\nstore = "int4"\nsearch = "best"', "rules.1.search"),
        ('weights = ["*"]\nstore = "int4"\naccuracy = 3', "rules.1.accuracy"),
        ('weights = ["*"]\nstore = "int4"\nzero_points = 1', "rules.1.zero_points"),
        ('weights = ["*"]', "rules.1.store"),
        ('store = "int4"', "rules.1.weights"),
    ],
)
def test_a_wrong_value_in_a_rule_is_rejected_by_key(file: Path, line: str, key: str) -> None:
    assert f"`{key}" in rejected(file, f"{HEAD}{RULE}[[rules]]\n{line}\n{LIMITS}").what


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("same_top = 0.9", "same_top = 1.1"),
        ("same_top = 0.9", "same_top = 0"),
        ("perplexity = 1.2", "perplexity = 0.9"),
        ("task_lost = 1", "task_lost = -1"),
        ("task_lost = 1", "task_lost = 0.5"),
        ("weight = 0.2", "weight = 0"),
        ("lead = 2.0", ""),
    ],
)
def test_a_limit_without_effect_is_rejected(file: Path, right: str, wrong: str) -> None:
    error = rejected(file, HEAD + RULE + LIMITS.replace(right, wrong))
    assert f"`limits.{right.partition(' ')[0]}`" in error.what


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(HEAD + RULE, id="rules"),
        pytest.param(HEAD.replace("fp32", "fp16"), id="precision"),
    ],
)
def test_a_lossy_recipe_needs_limits(file: Path, text: str) -> None:
    error = rejected(file, text)
    assert "`limits` is missing" in error.what
    assert "shipped recipe" in str(error.next)


def test_an_exact_recipe_has_no_limits(file: Path) -> None:
    error = rejected(file, HEAD + LIMITS)
    assert "an exact recipe has no `limits`" in error.what
    assert error.next == "remove `limits`"


def test_plain_onnxruntime_does_not_support_rules(file: Path) -> None:
    error = rejected(file, HEAD.replace('"genai"', '"genai", "onnxruntime"') + RULE + LIMITS)
    assert "the target `onnxruntime` does not support `rules`" in error.what
    assert 'remove "onnxruntime"' in str(error.next)


@pytest.mark.parametrize("line", ['precision = "fp16"', 'precision = "fp32"\nprovider = "cuda"'])
def test_plain_onnxruntime_is_built_in_fp32_for_the_cpu(file: Path, line: str) -> None:
    limits = LIMITS if "fp16" in line else ""
    error = rejected(file, f'{line}\ntargets = ["onnxruntime"]\n{limits}')
    assert "the target `onnxruntime` is built in fp32" in error.what


@pytest.mark.parametrize(
    "text", [HEAD + 'attention = "eager"\n' + RULE, HEAD.replace("32", "16") + 'attention = "eager"\n']
)
def test_eager_attention_is_for_fp32(file: Path, text: str) -> None:
    error = rejected(file, text + LIMITS)
    assert "eager attention is built in fp32 only" in error.what
    assert (error.expected, error.found) == ("fused", "eager")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (HEAD.replace("fp32", "bf16"), "the provider cpu does not compute in bf16"),
        (HEAD.replace("fp32", "bf16") + 'provider = "dml"\n', "the provider dml does not compute in bf16"),
        (HEAD + 'provider = "dml"\n', "the provider dml has no MatMulNBits for int8"),
        (HEAD + 'provider = "qnn"\n', "`provider` is invalid"),
    ],
)
def test_a_provider_without_the_kernels_is_rejected(file: Path, head: str, message: str) -> None:
    assert message in rejected(file, head + RULE + LIMITS).what


def test_like_inherits_the_keys_that_are_not_set(file: Path) -> None:
    base = load_recipe("int4")
    file.write_text('like = "int4"\nmax_length = 77\nprovider = "cuda"\nprecision = "fp16"\n', encoding="utf-8")
    recipe = load_recipe(file)
    assert (recipe.name, recipe.max_length, recipe.provider, recipe.precision) == ("mine", 77, "cuda", "fp16")
    assert (recipe.rules, recipe.limits, recipe.targets) == (base.rules, base.limits, base.targets)


def test_rules_replace_inherited_rules(file: Path) -> None:
    """Tables are not merged."""
    file.write_text('like = "int4"\n' + RULE, encoding="utf-8")
    assert [rule.weights for rule in load_recipe(file).rules] == [("model.visual.*",)]
    error = rejected(file, 'like = "int4"\n[limits]\nweight = 0.5\n')
    assert "the key `limits." in error.what


def test_like_can_be_chained(file: Path) -> None:
    assert 'like = "' in (SHIPPED / "int4-cuda.toml").read_text(encoding="utf-8")
    file.write_text('like = "int4-cuda"\nmax_length = 9\n', encoding="utf-8")
    assert load_recipe(file).rules == load_recipe("int4").rules
    assert (load_recipe(file).provider, load_recipe(file).max_length) == ("cuda", 9)


@pytest.mark.parametrize("base", ['"int5"', '"mine"', "3", '"../fp32"', "[]", '["int4"]', "{}"])
def test_like_must_name_another_shipped_recipe(file: Path, base: str) -> None:
    error = rejected(file, f"like = {base}\n")
    assert "`like` does not name another shipped recipe" in error.what
    assert "int4-fast" in str(error.expected)


def test_a_shipped_recipe_cannot_be_like_itself(tmp_path: Path) -> None:
    (tmp_path / "int4.toml").write_text('like = "int4"\n', encoding="utf-8")
    error = rejected(tmp_path / "int4.toml", 'like = "int4"\n')
    assert "int4, " not in str(error.expected)


@pytest.mark.parametrize("name", shipped())
def test_a_recipe_in_a_cache_key_is_json(name: str) -> None:
    recipe = load_recipe(name)
    rules, limits = plain(recipe.rules), plain(recipe.limits)
    assert json.loads(json.dumps([rules, limits])) == [rules, limits]
    assert isinstance(rules, list)
    assert [rule["weights"] for rule in rules] == [list(rule.weights) for rule in recipe.rules]
