"""The result of a graph pass."""

from __future__ import annotations

from dataclasses import dataclass

from builder.graph.binding import BoundGraph


@dataclass(frozen=True)
class PassResult:
    """The graph after the pass, how often the pass matched, and why candidates did not match."""

    graph: BoundGraph
    matches: int
    misses: tuple[str, ...] = ()
