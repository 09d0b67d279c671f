"""Which weights are stored how: the policy of a recipe.

In: a recipe's rules and the names and shapes of a checkpoint's matrices. Out: a `WeightFormat` for each matrix that a rule
names. Guaranteed: the first rule that matches wins; one that decides nothing is an error; what no rule names is kept as
it is. Vectors (norms, biases) and position tables are never quantized, whatever a pattern matches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from builder.checkpoint.tensors import EMBEDDINGS, LM_HEAD
from builder.quantization.blockwise import SMALLEST, Blocks, Search
from builder.util.errors import RecipeError

if TYPE_CHECKING:
    from builder.checkpoint.safetensors import Tensor

Store = Literal["int4", "int8", "keep"]
Activations = Literal["float", "int8"]
BITS: Mapping[Store, int] = {"int4": 4, "int8": 8}
POSITIONS = "model.visual.pos_embed.weight"  # a table that is interpolated, not looked up


@dataclass(frozen=True)
class Rule:
    """
    Args:
        weights: patterns (`*`, `?`, `[…]`) of checkpoint tensors; one that matches is enough.
        store: as what.
        block: elements that share a scale; where a row's length is no multiple of it, its half, its quarter, and so on.
        zero_points: a zero point a block.
        search: how levels are found (`builder.quantization.blockwise.Blocks`); "gptq" is for the text decoder and the
        head.
        accuracy: least precision of the activations in the product, as the operator counts: 1 fp32, 2 fp16, 4 int8.
        activations: "int8" rounds them as well, each tensor by its own range when it is there, and multiplies whole
            numbers; a row of the matrix has one scale. Twice as fast as fp32 where many rows are multiplied at once,
            and wrong where a few activations are far larger than all others: then the limits of the build fail.
    """

    weights: tuple[str, ...]
    store: Store
    block: int = 32
    zero_points: bool = False
    search: Search = "mse"
    accuracy: int = 4
    activations: Activations = "float"

    def matches(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.weights)


@dataclass(frozen=True)
class WeightFormat:
    """How one matrix is stored, and the least precision of what it is multiplied with (see `Rule`).

    Args:
        transposed: a row of the file is a column of the checkpoint's matrix, as products of whole numbers want it.
    """

    blocks: Blocks
    accuracy: int
    transposed: bool = False


def matrices(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name → length of a row, of every matrix that can be quantized: weights of linear layers, and the embeddings."""
    return {
        name: tensor.shape[1]
        for name, tensor in tensors.items()
        if len(tensor.shape) == 2 and name.endswith(".weight") and name != POSITIONS
    }


def resolve(rules: Sequence[Rule], tensors: Mapping[str, Tensor]) -> dict[str, WeightFormat]:
    """How each matrix is stored that is not kept.

    Raises:
        RecipeError: a rule decides nothing, or no block size fits a matrix.
    """
    found: dict[str, WeightFormat] = {}
    used: set[int] = set()
    for name, columns in matrices(tensors).items():
        for number, rule in enumerate(rules):
            if rule.matches(name):
                used.add(number)
                if rule.store != "keep":
                    found[name] = _weight_format(name, columns, rule)
                break
    idle = [rule for number, rule in enumerate(rules) if number not in used]
    if idle:
        raise RecipeError(
            f"the rule for {', '.join(idle[0].weights)} decides nothing",
            expected="a matrix of the checkpoint that no earlier rule decides",
            found=_why_idle(idle[0], tensors),
            next="remove the rule, or put it before those that are wider",
        )
    return found


def shares_the_head(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Whether `name` is the matrix that is both looked up and multiplied with."""
    return name == EMBEDDINGS and LM_HEAD not in tensors


def _weight_format(name: str, columns: int, rule: Rule) -> WeightFormat:
    if rule.activations == "int8":
        return WeightFormat(Blocks(BITS[rule.store], columns, search=rule.search), rule.accuracy, transposed=True)
    asked = Blocks(BITS[rule.store], rule.block, rule.zero_points, rule.search)
    size = asked.fitting(columns)
    if size is None:
        raise RecipeError(
            f"no block size fits {name}",
            expected=f"rows of a multiple of {SMALLEST}",
            found=f"rows of {columns}",
            next=f'put a rule before it: weights = ["{name}"], store = "keep"',
        )
    return WeightFormat(Blocks(asked.bits, size, asked.zero_points, asked.search), rule.accuracy)


def _why_idle(rule: Rule, tensors: Iterable[str]) -> str:
    named = [name for name in tensors if rule.matches(name)]
    if not named:
        return "no tensor of that name"
    return f"{named[0]}, which an earlier rule decides, or which is no matrix"
