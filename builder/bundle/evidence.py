"""Read what a bundle's newest verification measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.bundle.format1 import upgraded_parity
from builder.bundle.layout import EVIDENCE
from builder.util.errors import CheckpointError
from builder.util.json_files import read_json

PARITY = "parity.json"


def read_parity(bundle: Path) -> Mapping[str, Any] | None:
    """Read a bundle's parity.json in the current format's names; None where it is absent or unreadable."""
    try:
        return upgraded_parity(read_json(bundle / EVIDENCE / PARITY))
    except CheckpointError:
        return None


def excess(measured: float, limit: float) -> float:
    """Return measured / limit, by which gates are ranked; for a limit of 0: 0 if the gate passes, else infinity."""
    if not math.isfinite(measured):
        return math.inf
    if limit > 0:
        return measured / limit
    return 0.0 if measured <= 0 else math.inf


def worst_figures(parity: Mapping[str, Any]) -> dict[str, float | str]:
    """Map each place to the measured value of its gate with the largest `excess`, or to `not run`.

    Malformed gates are skipped: anyone may have written the file.
    """
    ranked: dict[str, tuple[float, float]] = {}
    for gate in _gates(parity):
        figure = float(gate["measured"]), float(gate["limit"])
        if str(gate["place"]) not in ranked or excess(*figure) > excess(*ranked[str(gate["place"])]):
            ranked[str(gate["place"])] = figure
    not_run = parity.get("not run")
    found: dict[str, float | str] = {place: measured for place, (measured, _) in ranked.items()}
    return found | (dict.fromkeys(not_run, "not run") if isinstance(not_run, Mapping) else {})


def _gates(parity: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    gates = parity.get("gates")
    return [gate for gate in gates if _is_gate(gate)] if isinstance(gates, list) else []


def _is_gate(gate: Any) -> bool:
    if not isinstance(gate, Mapping):
        return False
    try:
        float(gate["measured"]), float(gate["limit"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return False
    return isinstance(gate.get("place"), str)
