"""What to build, as values: a recipe in which every default is filled in."""

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
    """One consuming runtime and the attention that its graphs use."""

    runtime: str
    attention: Attention


@checked(frozen=True, config=ConfigDict(extra="forbid", defer_build=True))
class Limits:
    """What a build that is not exact may lose against PyTorch in fp32; a gate for each (builder/verify/quality.py).
    Also the schema of `[limits]` in a recipe.

    Args:
        weight: largest relative error of a weight matrix.
        kl_mean, kl_p99: KL divergence of the next token's distribution, in nats, over all positions that are compared.
        same_top: least share of positions whose likeliest token is the same.
        perplexity: largest ratio of perplexities on the shipped text.
        task_lost: held-out cases that fp32 gets right and this may get wrong.
        lead: largest lead, in logits, of PyTorch's own choice over a token that is generated in its place.
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
        name: the recipe file's stem; part of the default output folder's name.
        precision: of activations, and of the weights that no rule quantizes.
        targets: in the order they were written; the first one's bundle is what `build` prints last.
        max_length: tokens of prompt and answer together that a bundle's generation settings allow.
        provider: onnxruntime's execution provider that the settings in a bundle start.
        rules: see `builder.quantization.rules`.
        limits: None where the artifact has to equal the model.
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
        """Whether the artifact has to equal the model to the last digits of fp32."""
        return self.precision == "fp32" and not self.rules
