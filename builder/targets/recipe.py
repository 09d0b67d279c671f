"""A recipe: what to build, with every default filled in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked

from builder.quantization.rules import Rule
from builder.targets.providers import Name, Precision

Attention = Literal["eager", "fused"]
_Share = Annotated[float, Field(gt=0, le=1)]
_Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Target:
    """A runtime to build for, and the attention that its graphs use."""

    runtime: str
    attention: Attention


@checked(frozen=True, config=ConfigDict(extra="forbid", defer_build=True))
class Limits:
    """The accuracy that a build may lose against PyTorch in fp32, and the schema of `[limits]` in a recipe.

    builder/verify/quality.py has a gate for each.

    Args:
        weight: maximum relative error of a weight matrix.
        kl_mean, kl_p99: maximum KL divergence of the next token's distribution, in nats: mean and 99th percentile over
            all compared positions.
        same_top: minimum share of positions with the same top-1 token, in (0, 1].
        perplexity: maximum ratio of the perplexities on the shipped text, at least 1.
        task_lost: maximum number of held-out cases that are correct in fp32 and wrong in this build.
        lead: maximum margin, in logits, of PyTorch's token over the token that is generated instead.
    """

    weight: _Positive
    kl_mean: _Positive
    kl_p99: _Positive
    same_top: _Share
    perplexity: Annotated[float, Field(ge=1)]
    task_lost: Annotated[int, Field(strict=True, ge=0)]
    lead: _Positive


@dataclass(frozen=True)
class Recipe:
    """What to build.

    Args:
        name: stem of the recipe file; part of the default output folder's name.
        precision: of activations, and of weights that no rule quantizes.
        targets: in the order of the file; `build` prints the first target's bundle last.
        max_length: maximum number of prompt and generated tokens together in a bundle's generation settings.
        provider: onnxruntime's execution provider in a bundle's settings.
        rules: how to quantize weights, see `builder.quantization.rules`.
        limits: None if the artifact must equal the model.

    Example:
        >>> Recipe("mine", "fp32", (Target("genai", "fused"), Target("onnxruntime", "eager")), max_length=4096)
    """

    name: str
    precision: Precision
    targets: tuple[Target, ...]
    max_length: int
    provider: Name = "cpu"
    rules: tuple[Rule, ...] = ()
    limits: Limits | None = None

    @property
    def exact(self) -> bool:
        """Whether the artifact must equal the model up to fp32 rounding."""
        return self.precision == "fp32" and not self.rules
