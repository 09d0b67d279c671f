"""`verify --self-test`: break copies of a bundle, and see that the verification notices each and says where.

In: a bundle and its checkpoint. Out: a `SelfTest`. Guaranteed: the bundle itself passes first; a mutant counts as
caught only where the report's own first difference is the place that it must be; a mutant that a bundle cannot have is
listed with the reason; nothing of the bundle is changed.
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
from builder.verify.graphs.fp32_copy import write_twins
from builder.verify.graphs.per_layer import SlicedGraphs, TraceComparison
from builder.verify.layerwise import slice_budget, verify_sliced
from builder.verify.memory_budget import SLICE, verify_mode
from builder.verify.quantized import LossLimits, weight_gates
from builder.verify.report.gates import Gate, Report
from builder.verify.self_test.edits import InapplicableError
from builder.verify.self_test.mutants import MUTANTS, Mutant
from builder.verify.self_test.table import catch_markdown, renderables
from builder.verify.self_test.thresholds import Survivor, sites, survivor
from builder.verify.whole import verify

TOKENS = 6
PASSING = ".self_test-"  # how the folder of its copies is called


@dataclass(frozen=True)
class Catch:
    """What became of one mutant.

    Args:
        first: the first difference that the report names; None if it names none.
        inapplicable: why this bundle cannot be broken so; "" where it can.
        refused: what a runtime said that did not even load it.
    """

    mutant: Mutant
    target: str
    first: Gate | None = None
    inapplicable: str = ""
    refused: str = ""

    @property
    def status(self) -> str:
        """`caught`, `not caught`, `wrong place`, `refused` (it did not load: nothing is proven) or `does not apply`."""
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
        """For JSON; a figure that is no number is written as text."""
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
    """The catch table of one bundle.

    Args:
        control: the report of the bundle itself.
        survivors: what each gate with a tolerance lets live.
    """

    target: str
    checkpoint: str
    control: Report
    catches: tuple[Catch, ...]
    survivors: tuple[Survivor, ...]

    @property
    def ok(self) -> bool:
        """The bundle passes, at least one mutant was caught, all that apply were, and every gate can fail."""
        caught = any(one.status == "caught" for one in self.catches)
        live = any(one.fails is None for one in self.survivors)
        return self.control.ok and caught and not live and all(one.ok for one in self.catches)

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
            "mutants": [one.as_dict() for one in self.catches],
            "survivors": [one.as_dict() for one in self.survivors],
        }

    def renderables(self) -> Iterator[RenderableType]:
        """For the console."""
        return renderables(self.as_dict())

    def markdown(self) -> str:
        """For a README or a comment."""
        return catch_markdown(self.as_dict())


@dataclass(frozen=True)
class _Ways:
    """How this checkpoint is compared on this machine: a whole folder until something fails, or graph by graph."""

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
    """Breaks copies of a bundle in every way, and writes `self_test.json` and `.txt` into its `evidence/`.

    Args:
        checkpoint: that the bundle was made from.
        memory: bytes that may be used; None for all that this process may have.
        store: where the reference's outputs are kept for the next time; None keeps nothing.
        mutants: `MUTANTS` if None.

    Raises:
        BundleError: the folder is no bundle.
    """
    target, evidence = check_bundle(bundle), own_evidence(bundle)
    evidence.mkdir(exist_ok=True)
    for left in evidence.glob(f"{PASSING}*"):  # by a self-test that was killed
        rmtree(left, ignore_errors=True)
    terms = LossLimits.of(read_json(bundle / MANIFEST).get("recipe", {}))
    # Hard links need the file system that the bundle is on.
    with TemporaryDirectory(prefix=PASSING, dir=evidence) as passing:
        kept = Path(passing) / "store" if store is None else store
        chosen, broken = MUTANTS if mutants is None else mutants, Path(passing) / "broken"
        if terms is None:
            done = _tested(bundle, target, _ways(checkpoint, target, memory, kept), chosen, broken)
        else:  # its twin: graphs can be broken there whatever the precision
            write_twins(bundle, Path(passing) / "twin")
            own = Path(passing) / "weights" / checkpoint.name
            write_dequantized(bundle, checkpoint, terms.precision, own)
            ways = _ways(open_checkpoint(own), target, memory, Path(passing) / "store")
            ways = replace(ways, compare=partial(_weights_first, ways, target, checkpoint, terms))
            done = _tested(Path(passing) / "twin", target, ways, chosen, broken)
    write_text(evidence / "self_test.json", json.dumps(done.as_dict(), indent=1, ensure_ascii=False) + "\n")
    write_text(evidence / "self_test.txt", as_text(*done.renderables()) + "\n")
    return done


def failed(done: SelfTest, folder: Path) -> VerificationError:
    """The error that names what is not as it must be."""
    wrong = [f"{one.mutant.name} ({one.status})" for one in done.catches if not one.ok]
    wrong += [f"{one.place} lets {one.what} be doubled" for one in done.survivors if one.fails is None]
    first = done.control.first_failure
    if first is not None:
        wrong = [f"the bundle itself fails: {first.place}, {first.case}"]
    return VerificationError(
        f"the verification of {done.target} does not notice what it must, or not where it is",
        expected="every mutant caught, at its place",
        found="; ".join(wrong) or "no mutant applies",
        next=f"read {folder / 'self_test.txt'}",
    )


def _ways(checkpoint: Checkpoint, target: str, memory: int | None, store: Path) -> _Ways:
    chosen = tuple(case for case in shipped_cases() if "self-test" in case.tags)
    available, hidden = machine.memory_limit() if memory is None else memory, checkpoint.text.hidden
    if verify_mode(checkpoint, available) == "whole":
        whole, suite = Reference(checkpoint), Suite(chosen, tokens=TOKENS)
        return _Ways(
            whole,
            lambda folder: verify(folder, target, whole, suite, fail_fast=True),
            lambda folder: TraceComparison(SlicedGraphs(folder, target, hidden, SLICE, apart=False), whole),
        )
    streamed = Reference(checkpoint, streamed=True)
    return _Ways(
        streamed,
        lambda folder: verify_sliced(folder, target, streamed, available, store, chosen, fail_fast=True),
        lambda folder: TraceComparison(SlicedGraphs(folder, target, hidden, slice_budget(available)), streamed),
    )


def _weights_first(ways: _Ways, target: str, checkpoint: Checkpoint, terms: LossLimits, folder: Path) -> Report:
    """A quantized bundle's weights against the checkpoint's, then its graphs against PyTorch on its own weights."""
    with TemporaryDirectory(dir=folder.parent) as passing:
        errors = write_dequantized(folder, checkpoint, terms.precision, Path(passing))
    gates = tuple(weight_gates(errors, terms.limits))
    if all(gate.ok for gate in gates):
        report = ways.compare(folder)
        return replace(report, gates=(*gates, *report.gates))
    return Report(target, checkpoint.name, gates, {})


def _tested(bundle: Path, target: str, ways: _Ways, mutants: Sequence[Mutant], folder: Path) -> SelfTest:
    checkpoint = ways.reference.checkpoint
    scaled = sites(target, len(checkpoint.vision.deepstack), checkpoint.vision.depth, checkpoint.text.layers)
    with progress(f"self-test {target}", 1 + len(mutants) + len(scaled)) as advance:
        with _copied(bundle, folder):
            control = ways.compare(folder)
        advance()
        catches: list[Catch] = []
        survivors: list[Survivor] = []
        if control.ok:
            for mutant in mutants:
                catches.append(_catch(mutant, bundle, target, ways, folder))
                advance()
            case = next(case for case in shipped_cases() if "self-test" in case.tags)
            prompt = ways.reference.prepare(case.prompt, case.images)
            asked = ReferenceCase(case.name, prompt, ways.reference.hidden_states(prompt))
            for site in scaled:
                with _copied(bundle, folder):
                    survivors.append(survivor(site, folder, target, asked, ways.graphs))
                advance()
    return SelfTest(target, checkpoint.name, control, tuple(catches), tuple(survivors))


def _catch(mutant: Mutant, bundle: Path, target: str, ways: _Ways, folder: Path) -> Catch:
    with _copied(bundle, folder):
        try:
            mutant.change(folder, target)
            return Catch(mutant, target, ways.compare(folder).first_failure)
        except InapplicableError as reason:
            return Catch(mutant, target, inapplicable=str(reason))
        except BundleError as error:
            return Catch(mutant, target, refused=f"{error.what}: {error.found}")


@contextmanager
def _copied(bundle: Path, folder: Path) -> Iterator[None]:
    """The bundle's files, but for its evidence, as links in a folder that goes."""
    folder.mkdir()
    with TemporaryDirectory(dir=folder.parent) as gone:
        for name in own_files(bundle):
            link(bundle / name, folder / name)
        try:
            yield
        finally:
            folder.rename(Path(gone) / folder.name)
