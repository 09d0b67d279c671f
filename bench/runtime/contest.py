"""Everyone in turn, round after round.

In: contestants. Out: contestant → `Outcome`. Guaranteed: one that fails is not asked again, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.runtime.contestants import Contestant
from bench.runtime.figures import Measured, Outcome, undisturbed


@dataclass(frozen=True)
class Rules:
    """How it is measured.

    Args:
        repeat: rounds.
        patience: seconds to wait, before each process, for a moment at which the machine is idle.
    """

    repeat: int
    patience: float
    say: Callable[[str], None] = print


def contest(contestants: Sequence[Contestant], rules: Rules) -> dict[str, Outcome]:
    """A B C A B C."""
    outcomes = {one.name: Outcome() for one in contestants}
    failed: set[tuple[str, str]] = set()
    for number in range(rules.repeat):
        for one in contestants:
            if one.once and number:
                continue
            for task, measure in one.tasks.items():
                if (one.name, task) in failed:
                    continue
                rules.say(f"round {number + 1} of {rules.repeat}: {one.name}, {task}")
                found = undisturbed(measure, rules.patience)
                if found.failure is not None:
                    failed.add((one.name, task))
                outcomes[one.name] = _with(outcomes[one.name], task, found)
    return outcomes


def _with(outcome: Outcome, task: str, found: Measured) -> Outcome:
    runs = {name: list(values) for name, values in outcome.runs.items()}
    for name, value in found.figures.items():
        runs.setdefault(name, []).append(value)
    failures = outcome.failures + ((f"{task}: {found.failure}",) if found.failure else ())
    return Outcome(runs, failures, max(outcome.others, found.others))
