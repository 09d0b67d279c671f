"""What a graph pass returns."""

from __future__ import annotations

from dataclasses import dataclass

from builder.graph.binding import BoundGraph


@dataclass(frozen=True)
class Outcome:
    """The graph behind the pass, how often it matched, and why candidates did not."""

    graph: BoundGraph
    matches: int
    misses: tuple[str, ...] = ()
