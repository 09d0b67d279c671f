"""The rules of a recipe: how each weight matrix is stored.

The first rule that matches a matrix applies; a rule that applies to no matrix is an error; a matrix without a rule is
not quantized. Vectors (norms, biases) and position tables are never quantized, whatever the patterns match.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    """How matching matrices are stored; also the schema of `[[rules]]` in a recipe.

    Example:
        GPTQ for the MLPs of the text decoder, everything else in 8 bits:

        >>> rules = (
        ...     Rule(("model.language_model.layers.*.mlp.*",), "int4", search="gptq"),
        ...     Rule(("*",), "int8"),
        ... )
        >>> rules[0].matches("model.language_model.layers.0.mlp.up_proj.weight")
        True

    Args:
        weights: patterns (`*`, `?`, `[…]`) of checkpoint tensors; a tensor has to match at least one pattern.
        store: type of the codes; "keep" does not quantize.
        block: elements that share a scale; halved until it divides the length of a row.
        zero_points: whether each block has a zero point.
        search: how codes are chosen, see `builder.quantization.blockwise.Blocks`; "gptq" is for the text decoder and
            the head.
        accuracy: `accuracy_level` of MatMulNBits, the lowest precision of the activations: 1 fp32, 2 fp16, 4 int8.
        activations: "int8" also quantizes the activations, per tensor by their range at run time, and multiplies
            integers; each row of the matrix has a single scale. Twice as fast as fp32 for matmuls with many rows, but
            wrong if a few activations are far larger than the others: then the limits of the build fail.
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
    """How a matrix is stored.

    Args:
        blocks: the quantization format.
        accuracy: the lowest precision of the activations, see `Rule`.
        transposed: codes are stored transposed, as integer matmuls need them.
    """

    blocks: Blocks
    accuracy: int
    transposed: bool = False


def matrices(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name → row length of every matrix that can be quantized: weights of linear layers, and the embeddings."""
    return {
        name: tensor.shape[1]
        for name, tensor in tensors.items()
        if len(tensor.shape) == 2 and name.endswith(".weight") and name != POSITIONS
    }


def resolve(rules: Sequence[Rule], tensors: Mapping[str, Tensor]) -> dict[str, WeightFormat]:
    """The format of each matrix that is quantized, by tensor name.

    Raises:
        RecipeError: a rule applies to no matrix, or no block size fits a matrix.
    """
    weight_formats: dict[str, WeightFormat] = {}
    used: set[int] = set()
    for name, columns in matrices(tensors).items():
        for number, rule in enumerate(rules):
            if rule.matches(name):
                used.add(number)
                if rule.store != "keep":
                    weight_formats[name] = _weight_format(name, columns, rule)
                break
    idle = [rule for number, rule in enumerate(rules) if number not in used]
    if idle:
        raise RecipeError(
            f"the rule for {', '.join(idle[0].weights)} applies to no matrix",
            expected="a matrix of the checkpoint that no earlier rule matches",
            found=_why_idle(idle[0], tensors),
            next="remove the rule, or put it before those that are wider",
        )
    return weight_formats


def shares_the_head(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Whether `name` is both the embeddings and the head."""
    return name == EMBEDDINGS and LM_HEAD not in tensors


def _weight_format(name: str, columns: int, rule: Rule) -> WeightFormat:
    if rule.activations == "int8":
        return WeightFormat(Blocks(BITS[rule.store], columns, search=rule.search), rule.accuracy, transposed=True)
    requested = Blocks(BITS[rule.store], rule.block, rule.zero_points, rule.search)
    size = requested.fitting(columns)
    if size is None:
        raise RecipeError(
            f"no block size fits {name}",
            expected=f"a row length that is a multiple of {SMALLEST}",
            found=f"rows of {columns}",
            next=f'put a rule before it: weights = ["{name}"], store = "keep"',
        )
    return WeightFormat(replace(requested, size=size), rule.accuracy)


def _why_idle(rule: Rule, tensors: Iterable[str]) -> str:
    named = [name for name in tensors if rule.matches(name)]
    if not named:
        return "no tensor of that name"
    return f"{named[0]}, which an earlier rule matches, or which is not a matrix"
