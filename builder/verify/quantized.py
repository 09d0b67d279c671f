"""Prove what can be proved of a bundle that is not exact, and measure the rest.

In: a folder (or a bundle), the checkpoint, the recipe's limits. Out: one `Report`. Guaranteed: two questions are
asked apart. Is the graph right? Its twin in fp32 (builder/verify/graphs/fp32_copy.py) must equal PyTorch on the
bundle's own weights,
dequantized, to the last digits and token for token: whatever breaks a graph at fp32 is caught here, at its place.
What do the weights and the arithmetic cost? The bundle as it ships is measured against PyTorch on the checkpoint
(builder/verify/quality.py).
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
from builder.verify.graphs.fp32_copy import write_for_cpu, write_twins
from builder.verify.quality import quality_gates
from builder.verify.report.gates import Gate, Report

NO_BF16 = "onnxruntime's CPU provider has no bf16 MatMul: this bundle was checked through its fp32 twin alone"


@dataclass(frozen=True)
class LossLimits:
    """What a bundle promises: see `builder.targets.recipe.Recipe`."""

    precision: str
    provider: str
    limits: Limits

    @classmethod
    def of(cls, recipe: Mapping[str, Any]) -> LossLimits | None:
        """From a manifest's "recipe"; None where the bundle has to be exact.

        Raises:
            BundleError: the limits are not those of a recipe.
        """
        limits = recipe.get("limits")
        if not limits:
            return None
        try:
            return cls(recipe["precision"], recipe["provider"], Limits(**limits))
        except (KeyError, TypeError, ValidationError) as error:
            problems = error.errors() if isinstance(error, ValidationError) else []
            found = "; ".join(f"limits.{one['loc'][0]}: {one['msg']}" for one in problems) or str(error)
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
    """All gates of one folder.

    Args:
        reference: of the checkpoint itself.
        suite: what to compare; with a streamed reference, already `builder.verify.layerwise.for_slices`.
        exact: (a twin's folder, the checkpoint that it is, what to ask it) → its report.
        scratch: where the dequantized checkpoint lies meanwhile, at 4 bytes a weight.
    """
    checkpoint = reference.checkpoint
    scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=scratch) as passing:
        twin, dequantized = Path(passing) / "twin", Path(passing) / checkpoint.name
        errors = write_dequantized(folder, checkpoint, terms.precision, dequantized)
        write_twins(folder, twin)
        report = exact(twin, open_checkpoint(dequantized), replace(suite, cases=layerwise(suite.cases), tasks=()))
        gates, facts = [*weight_gates(errors, terms.limits), *report.gates], dict(report.facts)
        facts["weights"] = [vars(one) for one in errors]
        not_run = {**report.not_run, **_not_run(terms, target)}
        if terms.precision != "bf16":
            on_cpu = Path(passing) / "cpu"
            write_for_cpu(folder, on_cpu)
            lossy, measured = quality_gates(on_cpu, target, reference, terms.limits, suite)
            gates += lossy
            facts["quality"] = measured
            facts |= {"task": measured["task"]} if "task" in measured else {}
    return Report(target, checkpoint.name, tuple(gates), facts, not_run, report.exhibits)


def _not_run(terms: LossLimits, target: str) -> dict[str, str]:
    """What this machine cannot show."""
    why = RUNTIMES[target].missing()
    found = {} if terms.precision != "bf16" else dict.fromkeys(("KL divergence", "generated tokens"), NO_BF16)
    found = (dict.fromkeys(("generated tokens", "held-out accuracy"), why) if why else {}) | found
    if terms.provider != "cpu":
        found[f"the provider {terms.provider}"] = (
            "no such device here: its kernels are looked up (builder/targets/providers.py), "
            "the graphs ran on the CPU provider"
        )
    return found


def weight_gates(errors: Sequence[RoundingError], limits: Limits) -> Iterator[Gate]:
    """The matrix that is furthest from the checkpoint's, of each bit width, and its worst row."""
    for bits in sorted({one.bits for one in errors}):
        some = [one for one in errors if one.bits == bits]
        worst = max(some, key=lambda one: one.relative)
        row = max(some, key=lambda one: one.worst_row)
        name = f"{len(some)} matrices of {bits:g} bits"
        yield Gate("weights", f"{name}, worst: {worst.tensor}", worst.relative, limits.weight)
        yield Gate("weights", f"{name}, worst row: {row.tensor}", row.worst_row, 2 * limits.weight)
