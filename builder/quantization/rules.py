"""Which weights are stored how: the policy of a recipe.

The first rule that matches a matrix wins; a rule that decides nothing is an error; a matrix that no rule names is kept
as it is. Vectors (norms, biases) and position tables are never quantized, whatever a pattern matches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass as checked

from builder.checkpoint.tensors import EMBEDDINGS, LM_HEAD
from builder.quantization.blockwise import LARGEST_BLOCK, SMALLEST, Blocks, Search
from builder.util.errors import RecipeError

if TYPE_CHECKING:
    from builder.checkpoint.safetensors import Tensor

Store = Literal["int4", "int8", "keep"]
Activations = Literal["float", "int8"]
BITS: Mapping[Store, int] = {"int4": 4, "int8": 8}
POSITIONS = "model.visual.pos_embed.weight"  # a table that is interpolated, not looked up


def _block_size(value: int) -> int:
    if not SMALLEST <= value <= LARGEST_BLOCK or value & (value - 1):
        raise ValueError(f"a power of two from {SMALLEST} to {LARGEST_BLOCK}")
    return value


@checked(frozen=True, config=ConfigDict(extra="forbid", defer_build=True))
class Rule:
    """How the matrices that it matches are stored; also the schema of `[[rules]]` in a recipe.

    Args:
        weights: patterns (`*`, `?`, `[…]`) of checkpoint tensors; a tensor has to match one of them.
        store: the type of the stored codes; "keep" leaves the matrices as they are.
        block: elements that share a scale; half of it, a quarter and so on where it does not divide a row's length.
        zero_points: whether each block has a zero point.
        search: how codes are found (`builder.quantization.blockwise.Blocks`); "gptq" is for the text decoder and the
            head.
        accuracy: `accuracy_level` of MatMulNBits, the least precision of the activations: 1 fp32, 2 fp16, 4 int8.
        activations: "int8" quantizes the activations as well, each tensor by its range at run time, and multiplies
            integers; a row of the matrix has one scale. Twice as fast as fp32 where many rows are multiplied at once,
            and wrong where a few activations are far larger than all others: then the limits of the build fail.
    """

    weights: Annotated[tuple[str, ...], Field(min_length=1)]
    store: Store
    block: Annotated[int, Field(strict=True), AfterValidator(_block_size)] = 32
    zero_points: Annotated[bool, Field(strict=True)] = False
    search: Search = "mse"
    accuracy: Literal[1, 2, 4] = 4
    activations: Activations = "float"

    def matches(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.weights)


@dataclass(frozen=True)
class WeightFormat:
    """How one matrix is stored, and the least precision of the activations that it is multiplied with (see `Rule`).

    Args:
        transposed: a row of the file is a column of the checkpoint's matrix, as integer matmuls need it.
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
