"""Verify a lossy bundle: its graphs exactly, its weights and arithmetic within the recipe's limits.

The graphs are verified through an fp32 copy (builder/verify/graphs/fp32_copy.py), which must equal PyTorch on the
bundle's own dequantized weights within the fp32 tolerance and token for token. The loss is measured between the bundle
as shipped and PyTorch on the checkpoint (builder/verify/quality.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import ValidationError

from builder.bundle.dequantize import RoundingError, write_dequantized
from builder.checkpoint.load import Checkpoint, open_checkpoint
from builder.reference.cases import Suite, layerwise
from builder.reference.model import Reference
from builder.targets.recipe import Limits
from builder.targets.runners.registry import RUNTIMES
from builder.util.errors import BundleError
from builder.verify.graphs.fp32_copy import write_for_cpu, write_fp32_copy
from builder.verify.quality import quality_gates
from builder.verify.report.gates import Gate, Report

NO_BF16 = "onnxruntime's CPU provider has no bf16 MatMul: this bundle was checked only through its fp32 copy"


@dataclass(frozen=True)
class LossLimits:
    """The losses that a recipe allows; see `builder.targets.recipe.Recipe`."""

    precision: str
    provider: str
    limits: Limits

    @classmethod
    def of(cls, recipe: Mapping[str, Any]) -> LossLimits | None:
        """Read the "recipe" of a manifest; None if the bundle has to be exact.

        Raises:
            BundleError: the limits are malformed.
        """
        limits = recipe.get("limits")
        if not limits:
            return None
        try:
            return cls(recipe["precision"], recipe["provider"], Limits(**limits))
        except (KeyError, TypeError, ValidationError) as error:
            problems = error.errors() if isinstance(error, ValidationError) else []
            found = "; ".join(f"limits.{problem['loc'][0]}: {problem['msg']}" for problem in problems) or str(error)
            raise BundleError(
                "the manifest's recipe cannot be read", expected="precision, provider, limits", found=found
            ) from error


def verify_lossy(
    folder: Path,
    target: str,
    reference: Reference,
    terms: LossLimits,
    suite: Suite,
    exact: Callable[[Path, Checkpoint, Suite], Report],
    scratch: Path,
) -> Report:
    """Compute all gates of a configured folder or a bundle.

    Args:
        reference: of the original checkpoint.
        suite: cases to compare; with a streamed reference, from `builder.verify.layerwise.for_slices`.
        exact: (folder of the fp32 copy, its dequantized checkpoint, suite) → report.
        scratch: temporary folder for the dequantized checkpoint, 4 bytes per weight.
    """
    checkpoint = reference.checkpoint
    scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=scratch) as temporary:
        fp32_copy, dequantized = Path(temporary) / "fp32_copy", Path(temporary) / checkpoint.name
        errors = write_dequantized(folder, checkpoint, terms.precision, dequantized)
        write_fp32_copy(folder, fp32_copy)
        exact_suite = replace(suite, cases=layerwise(suite.cases), tasks=())
        report = exact(fp32_copy, open_checkpoint(dequantized), exact_suite)
        gates, facts = [*weight_gates(errors, terms.limits), *report.gates], dict(report.facts)
        facts["weights"] = [vars(error) for error in errors]
        not_run = {**report.not_run, **_not_run(terms, target)}
        if terms.precision != "bf16":
            on_cpu = Path(temporary) / "cpu"
            write_for_cpu(folder, on_cpu)
            lossy, measured = quality_gates(on_cpu, target, reference, terms.limits, suite)
            gates += lossy
            facts["quality"] = measured
            facts |= {"task": measured["task"]} if "task" in measured else {}
    return Report(target, checkpoint.name, tuple(gates), facts, not_run, report.exhibits)


def _not_run(terms: LossLimits, target: str) -> dict[str, str]:
    """Return place → why it cannot be compared on this machine."""
    why = RUNTIMES[target].missing()
    reasons = dict.fromkeys(("generated tokens", "held-out accuracy"), why) if why else {}
    if terms.precision == "bf16":
        reasons |= dict.fromkeys(("KL divergence", "generated tokens"), NO_BF16)
    if terms.provider != "cpu":
        reasons[f"the provider {terms.provider}"] = (
            "its device is not available: kernels were only looked up (builder/targets/providers.py), "
            "and the graphs ran on the CPU provider"
        )
    return reasons


def weight_gates(errors: Sequence[RoundingError], limits: Limits) -> Iterator[Gate]:
    """Yield, for each bit width, gates on the largest error of a matrix and of a row."""
    for bits in sorted({error.bits for error in errors}):
        matrices = [error for error in errors if error.bits == bits]
        worst = max(matrices, key=lambda error: error.relative)
        row = max(matrices, key=lambda error: error.worst_row)
        name = f"{len(matrices)} matrices of {bits:g} bits"
        yield Gate("weights", f"{name}, worst: {worst.tensor}", worst.relative, limits.weight)
        yield Gate("weights", f"{name}, worst row: {row.tensor}", row.worst_row, 2 * limits.weight)
