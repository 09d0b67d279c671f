"""What each execution provider of onnxruntime runs, and the settings with which onnxruntime-genai starts it.

In: a provider's name. Out: a `Provider`. Guaranteed: a recipe that a provider has no kernels for is refused before
any work. Source of the kernels: onnxruntime's docs/OperatorKernels.md and docs/ContribOperators.md; only `cpu` has
been run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from builder.checkpoint.tensors import EMBEDDINGS
from builder.quantization.rules import BITS, Rule
from builder.util.errors import RecipeError

Name = Literal["cpu", "cuda", "dml", "webgpu"]
Precision = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class Provider:
    """
    Args:
        precisions: of activations that its MatMul, GroupQueryAttention and norms take.
        bits: of the levels that its MatMulNBits takes.
        lookup: whether it has GatherBlockQuantized; where not, the embeddings graph runs on the CPU.
        whole_numbers: whether it has DynamicQuantizeMatMul.
        options: of the provider, as genai_config.json has them.
        session: further session options.
    """

    precisions: tuple[Precision, ...]
    bits: tuple[int, ...]
    lookup: bool = True
    whole_numbers: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    session: Mapping[str, Any] = field(default_factory=dict)


PROVIDERS: Mapping[Name, Provider] = {
    # Threads: 0 lets onnxruntime count the cores of the machine that it runs on. Without the setting onnxruntime-genai
    # takes half of the logical ones, which is half of the machine where a core has one thread.
    "cpu": Provider(("fp32", "fp16"), (4, 8), whole_numbers=True, session={"intra_op_num_threads": 0}),
    "cuda": Provider(("fp32", "fp16", "bf16"), (4, 8), options={"enable_cuda_graph": "0"}),
    "dml": Provider(("fp32", "fp16"), (4,), lookup=False),
    "webgpu": Provider(("fp32", "fp16"), (4, 8)),
}


def check_provider(name: Name, precision: Precision, rules: Sequence[Rule], where: object) -> None:
    """
    Args:
        where: the recipe, for the error.

    Raises:
        RecipeError: the provider has no kernel for what the recipe asks.
    """
    provider = PROVIDERS[name]
    if precision not in provider.precisions:
        able = [other for other, one in PROVIDERS.items() if precision in one.precisions]
        raise RecipeError(
            f"recipe {where}: the provider {name} does not compute in {precision}",
            expected=" or ".join(provider.precisions),
            found=precision,
            next=f'provider = "{able[0]}"' if able else None,
        )
    for rule in rules:
        if rule.activations == "int8" and not (provider.whole_numbers and precision == "fp32"):
            raise RecipeError(
                f"recipe {where}: the provider {name} does not multiply 8-bit activations in {precision}",
                expected='provider = "cpu" and precision = "fp32", or activations as they are',
                found=f"activations of 8 bits for {', '.join(rule.weights)}",
                next="remove `activations`",
            )
        if rule.store != "keep" and BITS[rule.store] not in provider.bits and not _looked_up(rule):
            raise RecipeError(
                f"recipe {where}: the provider {name} has no MatMulNBits for {rule.store}",
                expected=" or ".join(f"int{bits}" for bits in provider.bits),
                found=f"{rule.store} for {', '.join(rule.weights)}",
                next=f'store = "int{provider.bits[0]}", or another provider',
            )


def session_options(name: Name, *, lookup: bool = False) -> dict[str, Any]:
    """`session_options` of one graph in genai_config.json.

    Args:
        lookup: whether it is the embeddings graph, with quantized rows.
    """
    provider = PROVIDERS[name]
    on_cpu = name == "cpu" or (lookup and not provider.lookup)
    settings = PROVIDERS["cpu"].session if on_cpu else provider.session
    return {
        "log_id": "onnxruntime-genai",
        **settings,
        "provider_options": [] if on_cpu else [{name: dict(provider.options)}],
    }


def _looked_up(rule: Rule) -> bool:
    """A rule for the embeddings alone makes no product."""
    return all(pattern == EMBEDDINGS for pattern in rule.weights)
