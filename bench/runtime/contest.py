"""Measure all contestants in turn, round after round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.runtime.contestants import Contestant
from bench.runtime.figures import Measured, Outcome, undisturbed


@dataclass(frozen=True)
class Rules:
    """Settings of a contest.

    Args:
        repeat: number of rounds.
        patience: seconds to wait, before each process, for an idle machine.
    """

    repeat: int
    patience: float
    log: Callable[[str], None] = print


def contest(contestants: Sequence[Contestant], rules: Rules) -> dict[str, Outcome]:
    """Run the contestants in the order A B C A B C; a task that fails is not run again."""
    outcomes = {contestant.name: Outcome() for contestant in contestants}
    failed: set[tuple[str, str]] = set()
    for number in range(rules.repeat):
        for contestant in contestants:
            if contestant.once and number:
                continue
            name = contestant.name
            for task, measure in contestant.tasks.items():
                if (name, task) in failed:
                    continue
                rules.log(f"round {number + 1} of {rules.repeat}: {name}, {task}")
                measured = undisturbed(measure, rules.patience)
                if measured.failure is not None:
                    failed.add((name, task))
                outcomes[name] = _with(outcomes[name], task, measured)
    return outcomes


def _with(outcome: Outcome, task: str, measured: Measured) -> Outcome:
    runs = {name: list(values) for name, values in outcome.runs.items()}
    for name, value in measured.figures.items():
        runs.setdefault(name, []).append(value)
    failures = outcome.failures + ((f"{task}: {measured.failure}",) if measured.failure else ())
    return Outcome(runs, failures, max(outcome.others, measured.others))
