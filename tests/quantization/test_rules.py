"""rules: which rule applies, rules that never apply, and what is never quantized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from builder.checkpoint.load import open_checkpoint
from builder.checkpoint.safetensors import Tensor
from builder.checkpoint.tensors import EMBEDDINGS, LM_HEAD
from builder.quantization.blockwise import Blocks
from builder.quantization.rules import POSITIONS, Rule, WeightFormat, matrices, resolve, shares_the_head
from builder.util.errors import RecipeError

LAYER = "model.language_model.layers.0."
QUERY, DOWN, NORM = f"{LAYER}self_attn.q_proj.weight", f"{LAYER}mlp.down_proj.weight", f"{LAYER}norm.weight"
PATCHES = "model.visual.patch_embed.proj.weight"
SHAPES: dict[str, tuple[int, ...]] = {
    QUERY: (8, 64),
    DOWN: (64, 96),
    NORM: (64,),
    f"{LAYER}self_attn.q_proj.bias": (8,),
    PATCHES: (48, 3, 2, 16, 16),
    POSITIONS: (144, 48),
    "model.visual.blocks.0.attn.qkv.weight": (144, 48),
    EMBEDDINGS: (100, 64),
}


def tensors(**more: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: Tensor(name, "model.safetensors", "F32", shape, 0, 0) for name, shape in (SHAPES | more).items()}


def refused(*rules: Rule, **more: tuple[int, ...]) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        resolve(rules, tensors(**more))
    return caught.value


def test_the_first_rule_that_matches_applies() -> None:
    narrow, wide = Rule((QUERY,), "int8", search="none", accuracy=1), Rule((f"{LAYER}*",), "int4")
    assert resolve([narrow, wide], tensors()) == {
        QUERY: WeightFormat(Blocks(8, 32, search="none"), 1),
        DOWN: WeightFormat(Blocks(4, 32, search="mse"), 4),
    }


def test_a_wider_rule_in_front_leaves_a_narrower_rule_idle() -> None:
    narrow, wide = Rule((QUERY,), "int8"), Rule((f"{LAYER}*",), "int4")
    error = refused(wide, narrow)
    assert QUERY in error.what
    assert str(error.found).startswith(QUERY)
    assert "earlier rule" in str(error.found)
    assert "before those that are wider" in str(error.next)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        pytest.param("model.layers.*", "no tensor of that name", id="no such name"),
        pytest.param(NORM, f"{NORM}, which an earlier rule matches, or which is not a matrix", id="a vector"),
        pytest.param(POSITIONS, f"{POSITIONS}, which", id="the table of positions"),
        pytest.param(PATCHES, f"{PATCHES}, which", id="the patch embedding"),
        pytest.param("*.bias", "q_proj.bias, which", id="biases"),
    ],
)
@pytest.mark.parametrize("store", ["int4", "keep"])
def test_a_rule_without_a_matrix_is_an_error_that_tells_why(pattern: str, reason: str, store: str) -> None:
    error = refused(Rule((pattern,), store))  # type: ignore[arg-type]
    assert pattern in error.what
    assert reason in str(error.found)


def test_a_keep_rule_excludes_matrices_from_later_rules() -> None:
    assert resolve([Rule((QUERY,), "keep"), Rule((f"{LAYER}*",), "int4")], tensors()).keys() == {DOWN}


def test_what_no_rule_names_is_left() -> None:
    assert resolve([], tensors()) == {}
    assert resolve([Rule((DOWN,), "int8")], tensors()).keys() == {DOWN}


def test_one_pattern_of_several_is_enough_and_case_counts() -> None:
    assert resolve([Rule(("nothing.*", DOWN), "int4")], tensors()).keys() == {DOWN}
    assert refused(Rule((DOWN.upper(),), "int4")).found == "no tensor of that name"


def test_vectors_positions_and_the_patch_embedding_are_never_quantized() -> None:
    quantized = {QUERY, DOWN, EMBEDDINGS, "model.visual.blocks.0.attn.qkv.weight"}
    assert matrices(tensors()).keys() == quantized
    assert resolve([Rule(("*",), "int4")], tensors()).keys() == quantized


@pytest.mark.parametrize(("block", "sizes"), [(16, (16, 16)), (32, (32, 32)), (64, (64, 32)), (256, (64, 32))])
def test_a_block_is_halved_until_it_divides_a_row(block: int, sizes: tuple[int, int]) -> None:
    found = resolve([Rule((QUERY, DOWN), "int4", block, zero_points=True, search="gptq")], tensors())
    assert [found[name].blocks for name in (QUERY, DOWN)] == [Blocks(4, size, True, "gptq") for size in sizes]


def test_a_row_that_no_block_fits_comes_with_the_rule_that_keeps_it() -> None:
    odd = "model.visual.blocks.0.mlp.linear_fc2.weight"
    error = refused(Rule(("model.visual.*",), "int8"), **{odd: (48, 72)})
    assert odd in error.what
    assert "16" in str(error.expected)
    assert error.found == "rows of 72"
    assert str(error.next).endswith(f'weights = ["{odd}"], store = "keep"')
    kept = [Rule((odd,), "keep"), Rule(("model.visual.*",), "int8")]
    assert odd not in resolve(kept, tensors(**{odd: (48, 72)}))


@pytest.mark.parametrize(("shape", "tied"), [("biased", True), ("untied", False)])
def test_an_untied_head_is_a_matrix_of_its_own(checkpoint: Callable[[str], Path], shape: str, tied: bool) -> None:
    found = open_checkpoint(checkpoint(shape)).tensors
    assert shares_the_head(found, EMBEDDINGS) is tied
    assert not shares_the_head(found, LM_HEAD)
    assert not shares_the_head(found, DOWN)
    assert (LM_HEAD in matrices(found)) is not tied
    both = resolve([Rule((EMBEDDINGS, LM_HEAD), "int4")], found)
    assert both.keys() == ({EMBEDDINGS} if tied else {EMBEDDINGS, LM_HEAD})
    if tied:
        with pytest.raises(RecipeError, match="no tensor of that name"):
            resolve([Rule((LM_HEAD,), "int4")], found)


def test_everything_that_is_quantized_of_a_checkpoint_is_a_weight_of_two_axes(
    checkpoint: Callable[[str], Path],
) -> None:
    found = open_checkpoint(checkpoint("biased")).tensors
    quantized = resolve([Rule(("*",), "int4")], found)
    two = {name for name, tensor in found.items() if len(tensor.shape) == 2}
    assert two - quantized.keys() == {POSITIONS}
    assert len(found[PATCHES].shape) == 5
    assert all(found[name].shape[1] % weight_format.blocks.size == 0 for name, weight_format in quantized.items())
