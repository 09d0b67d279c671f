"""Break copies of a bundle, and check that the verification catches each mutant at the right place.

The bundle itself must pass first. A mutant is caught only if the report's first difference is at an expected place.

Guarantees: only the bundle's evidence/ is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import RenderableType

from builder.bundle.dequantize import write_dequantized
from builder.bundle.layout import MANIFEST, check_bundle, own_evidence, own_files
from builder.checkpoint.load import Checkpoint, open_checkpoint
from builder.reference.cases import Suite, shipped_cases
from builder.reference.model import Reference
from builder.util import machine
from builder.util.console_table import as_text
from builder.util.errors import BundleError, VerificationError
from builder.util.files import link, write_text
from builder.util.json_files import read_json
from builder.util.progress import progress
from builder.verify.graphs.compare import ReferenceCase
from builder.verify.graphs.fp32_copy import write_fp32_copy
from builder.verify.graphs.per_layer import SlicedGraphs, TraceComparison
from builder.verify.layerwise import slice_budget, verify_layerwise
from builder.verify.memory_budget import SLICE, verify_mode
from builder.verify.quantized import LossLimits, weight_gates
from builder.verify.report.gates import Gate, Report
from builder.verify.self_test.edits import InapplicableError
from builder.verify.self_test.mutants import MUTANTS, Mutant
from builder.verify.self_test.table import catch_markdown, renderables
from builder.verify.self_test.thresholds import Threshold, measure_threshold, sites
from builder.verify.whole import verify

TOKENS = 6
TEMPORARY = ".self_test-"  # prefix of the folder of copies


@dataclass(frozen=True)
class Catch:
    """The result of one mutant.

    Args:
        first: the first difference in the report, if any.
        inapplicable: why this bundle cannot be broken in this way; "" if it can.
        refused: the error of a runtime that did not load the broken bundle; "" if it did.
    """

    mutant: Mutant
    target: str
    first: Gate | None = None
    inapplicable: str = ""
    refused: str = ""

    @property
    def status(self) -> str:
        """`caught`, `not caught`, `wrong place`, `refused` (did not load, so proves nothing) or `does not apply`."""
        if self.inapplicable:
            return "does not apply"
        if self.refused:
            return "refused"
        if self.first is None:
            return "not caught"
        return "caught" if self.mutant.explains(self.target, self.first) else "wrong place"

    @property
    def ok(self) -> bool:
        return self.status in ("caught", "does not apply")

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON; figures that are not finite become text."""
        first = self.first
        measured = None if first is None else first.measured
        return {
            "name": self.mutant.name,
            "what": self.mutant.what,
            "status": self.status,
            "expected": sorted(self.mutant.places[self.target]),
            "at": self.mutant.at,
            "place": None if first is None else first.place,
            "case": None if first is None else first.case,
            "measured": measured if measured is None or math.isfinite(measured) else str(measured),
            "limit": None if first is None else first.limit,
            "detail": self.inapplicable or self.refused or ("" if first is None else first.detail),
        }


@dataclass(frozen=True)
class SelfTest:
    """The results of the self-test of one bundle.

    Args:
        control: the report of the bundle itself.
        thresholds: the largest error that each gate with a tolerance passes.
    """

    target: str
    checkpoint: str
    control: Report
    catches: tuple[Catch, ...]
    thresholds: tuple[Threshold, ...]

    @property
    def ok(self) -> bool:
        """Whether the bundle passes, every applicable mutant (at least one) is caught, and every gate can fail."""
        caught = any(catch.status == "caught" for catch in self.catches)
        can_fail = all(threshold.fails is not None for threshold in self.thresholds)
        return self.control.ok and caught and can_fail and all(catch.ok for catch in self.catches)

    def as_dict(self) -> dict[str, Any]:
        first = self.control.first_failure
        return {
            "target": self.target,
            "checkpoint": self.checkpoint,
            "verdict": "passed" if self.ok else "failed",
            "bundle": {
                "verdict": self.control.verdict,
                "first difference": None if first is None else f"{first.place}: {first.case}",
            },
            "mutants": [catch.as_dict() for catch in self.catches],
            "survivors": [threshold.as_dict() for threshold in self.thresholds],
        }

    def renderables(self) -> Iterator[RenderableType]:
        """Yield the tables for the console."""
        return renderables(self.as_dict())

    def markdown(self) -> str:
        """Return the tables as Markdown."""
        return catch_markdown(self.as_dict())


@dataclass(frozen=True)
class _Comparisons:
    """How to compare on this machine: a folder until the first failure, or graph by graph."""

    reference: Reference
    compare: Callable[[Path], Report]
    graphs: Callable[[Path], TraceComparison]


def self_test(
    bundle: Path,
    checkpoint: Checkpoint,
    memory: int | None = None,
    store: Path | None = None,
    mutants: Sequence[Mutant] | None = None,
) -> SelfTest:
    """Break copies of a bundle in every way, and write `self_test.json` and `.txt` into its `evidence/`.

    Args:
        checkpoint: of the bundle.
        memory: bytes that may be used; None for the limit of this process.
        store: folder that caches the reference's outputs; None for no cache.
        mutants: `MUTANTS` if None.

    Raises:
        BundleError: the folder is not a bundle.
    """
    target, evidence = check_bundle(bundle), own_evidence(bundle)
    evidence.mkdir(exist_ok=True)
    for left in evidence.glob(f"{TEMPORARY}*"):  # from a self-test that was killed
        rmtree(left, ignore_errors=True)
    terms = LossLimits.of(read_json(bundle / MANIFEST).get("recipe", {}))
    # Hard links need the file system of the bundle.
    with TemporaryDirectory(prefix=TEMPORARY, dir=evidence) as temporary:
        kept = Path(temporary) / "store" if store is None else store
        chosen, broken = MUTANTS if mutants is None else mutants, Path(temporary) / "broken"
        if terms is None:
            done = _tested(bundle, target, _comparisons(checkpoint, target, memory, kept), chosen, broken)
        else:  # break an fp32 copy, which works at any precision
            fp32_copy = Path(temporary) / "fp32_copy"
            write_fp32_copy(bundle, fp32_copy)
            own = Path(temporary) / "weights" / checkpoint.name
            write_dequantized(bundle, checkpoint, terms.precision, own)
            comparisons = _comparisons(open_checkpoint(own), target, memory, Path(temporary) / "store")
            comparisons = replace(comparisons, compare=partial(_weights_first, comparisons, target, checkpoint, terms))
            done = _tested(fp32_copy, target, comparisons, chosen, broken)
    write_text(evidence / "self_test.json", json.dumps(done.as_dict(), indent=1, ensure_ascii=False) + "\n")
    write_text(evidence / "self_test.txt", as_text(*done.renderables()) + "\n")
    return done


def failed(done: SelfTest, folder: Path) -> VerificationError:
    """Return the error for a self-test that failed."""
    wrong = [f"{catch.mutant.name} ({catch.status})" for catch in done.catches if not catch.ok]
    wrong += [f"{gate.place} passes with {gate.what} doubled" for gate in done.thresholds if gate.fails is None]
    first = done.control.first_failure
    if first is not None:
        wrong = [f"the bundle itself fails: {first.place}, {first.case}"]
    return VerificationError(
        f"the verification of {done.target} misses a mutant, or reports it at the wrong place",
        expected="every mutant caught at its place",
        found="; ".join(wrong) or "no mutant applies",
        next=f"read {folder / 'self_test.txt'}",
    )


def _comparisons(checkpoint: Checkpoint, target: str, memory: int | None, store: Path) -> _Comparisons:
    chosen = tuple(case for case in shipped_cases() if "self-test" in case.tags)
    available, hidden = machine.memory_limit() if memory is None else memory, checkpoint.text.hidden
    if verify_mode(checkpoint, available) == "whole":
        reference, suite = Reference(checkpoint), Suite(chosen, tokens=TOKENS)
        return _Comparisons(
            reference,
            lambda folder: verify(folder, target, reference, suite, fail_fast=True),
            lambda folder: TraceComparison(SlicedGraphs(folder, target, hidden, SLICE, separate=False), reference),
        )
    streamed = Reference(checkpoint, streamed=True)
    return _Comparisons(
        streamed,
        lambda folder: verify_layerwise(folder, target, streamed, available, store, chosen, fail_fast=True),
        lambda folder: TraceComparison(SlicedGraphs(folder, target, hidden, slice_budget(available)), streamed),
    )


def _weights_first(
    comparisons: _Comparisons, target: str, checkpoint: Checkpoint, terms: LossLimits, folder: Path
) -> Report:
    """Compare a lossy bundle's weights with the checkpoint, then its graphs with PyTorch on its own weights."""
    with TemporaryDirectory(dir=folder.parent) as temporary:
        errors = write_dequantized(folder, checkpoint, terms.precision, Path(temporary))
    gates = tuple(weight_gates(errors, terms.limits))
    if all(gate.ok for gate in gates):
        report = comparisons.compare(folder)
        return replace(report, gates=(*gates, *report.gates))
    return Report(target, checkpoint.name, gates, {})


def _tested(bundle: Path, target: str, comparisons: _Comparisons, mutants: Sequence[Mutant], folder: Path) -> SelfTest:
    checkpoint = comparisons.reference.checkpoint
    scaled = sites(target, len(checkpoint.vision.deepstack), checkpoint.vision.depth, checkpoint.text.layers)
    with progress(f"self-test {target}", 1 + len(mutants) + len(scaled)) as advance:
        with _copied(bundle, folder):
            control = comparisons.compare(folder)
        advance()
        catches: list[Catch] = []
        thresholds: list[Threshold] = []
        if control.ok:
            for mutant in mutants:
                catches.append(_catch(mutant, bundle, target, comparisons, folder))
                advance()
            case = next(case for case in shipped_cases() if "self-test" in case.tags)
            prompt = comparisons.reference.prepare(case.prompt, case.images)
            traced = ReferenceCase(case.name, prompt, comparisons.reference.hidden_states(prompt))
            for site in scaled:
                with _copied(bundle, folder):
                    thresholds.append(measure_threshold(site, folder, target, traced, comparisons.graphs))
                advance()
    return SelfTest(target, checkpoint.name, control, tuple(catches), tuple(thresholds))


def _catch(mutant: Mutant, bundle: Path, target: str, comparisons: _Comparisons, folder: Path) -> Catch:
    with _copied(bundle, folder):
        try:
            mutant.change(folder, target)
            return Catch(mutant, target, comparisons.compare(folder).first_failure)
        except InapplicableError as reason:
            return Catch(mutant, target, inapplicable=str(reason))
        except BundleError as error:
            return Catch(mutant, target, refused=f"{error.what}: {error.found}")


@contextmanager
def _copied(bundle: Path, folder: Path) -> Iterator[None]:
    """Link the bundle's files, without its evidence, into a folder that exists inside the block."""
    folder.mkdir()
    with TemporaryDirectory(dir=folder.parent) as gone:
        for name in own_files(bundle):
            link(bundle / name, folder / name)
        try:
            yield
        finally:
            folder.rename(Path(gone) / folder.name)
