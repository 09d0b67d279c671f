"""Kernels and onnxruntime-genai settings of onnxruntime's execution providers.

Source: onnxruntime's docs/OperatorKernels.md and docs/ContribOperators.md. Only `cpu` has been run.
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
    """Capabilities and settings of an execution provider.

    Args:
        precisions: activation types of its MatMul, GroupQueryAttention and norms.
        bits: bit widths of its MatMulNBits.
        lookup: whether it has GatherBlockQuantized; otherwise a quantized embeddings graph runs on the CPU.
        int8_activations: whether it has DynamicQuantizeMatMul.
        options: provider options in genai_config.json.
        session: additional session options.
    """

    precisions: tuple[Precision, ...]
    bits: tuple[int, ...]
    lookup: bool = True
    int8_activations: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    session: Mapping[str, Any] = field(default_factory=dict)


PROVIDERS: Mapping[Name, Provider] = {
    # 0 lets onnxruntime count the machine's cores. By default onnxruntime-genai uses half the logical cores, which is
    # half the machine where a core has one thread.
    "cpu": Provider(("fp32", "fp16"), (4, 8), int8_activations=True, session={"intra_op_num_threads": 0}),
    "cuda": Provider(("fp32", "fp16", "bf16"), (4, 8), options={"enable_cuda_graph": "0"}),
    "dml": Provider(("fp32", "fp16"), (4,), lookup=False),
    "webgpu": Provider(("fp32", "fp16"), (4, 8)),
}


def check_provider(name: Name, precision: Precision, rules: Sequence[Rule], where: object) -> None:
    """Check that a provider has the kernels that a recipe requires.

    Args:
        where: the recipe file, for the error message.

    Raises:
        RecipeError: the provider does not support the precision or a rule.
    """
    provider = PROVIDERS[name]
    if precision not in provider.precisions:
        able = [other for other, candidate in PROVIDERS.items() if precision in candidate.precisions]
        raise RecipeError(
            f"recipe {where}: the provider {name} does not compute in {precision}",
            expected=" or ".join(provider.precisions),
            found=precision,
            next=f'provider = "{able[0]}"' if able else None,
        )
    for rule in rules:
        if rule.activations == "int8" and not (provider.int8_activations and precision == "fp32"):
            raise RecipeError(
                f"recipe {where}: the provider {name} does not multiply 8-bit activations in {precision}",
                expected='provider = "cpu" and precision = "fp32", or activations that are not quantized',
                found=f"8-bit activations for {', '.join(rule.weights)}",
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
    """Return the `session_options` of a graph in genai_config.json.

    Args:
        lookup: whether the graph is an embeddings graph with quantized rows.
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
    """Return whether a rule is for the embeddings only, which are not an operand of a MatMul."""
    return all(pattern == EMBEDDINGS for pattern in rule.weights)
