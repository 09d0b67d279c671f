"""What a consuming runtime asks of its artifacts, as a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from builder.checkpoint import Checkpoint


@dataclass(frozen=True)
class Runtime:
    """
    Args:
        name: the recipe's name of the target.
        opset: the one opset of its graphs.
        domains: operator domains that its graphs may contain.
        module: (checkpoint, upstream model, graph name, fused) → the module to trace.
        passes: (graph name, fused) → names of the passes to run, in order (builder/passes/).
        configs: (checkpoint, build settings) → {file name: text} of the configuration beside the graphs.
    """

    name: str
    opset: int
    domains: frozenset[str]
    module: Callable[[Checkpoint, Any, str, bool], Any]
    passes: Callable[[str, bool], tuple[str, ...]]
    configs: Callable[[Checkpoint, Any, Any], Mapping[str, str]]
