"""Map names in reports and goldens of format 1 to the current names; the only such mapping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VERDICTS = {"sliced": "partial"}
PLACES = {"decoded picture": "decoded image", "other top-1": "top-1 disagreement", "task": "held-out accuracy"}
CASES = {"one picture": "one image", "three pictures": "three images"}
OLD_CASES = {new: old for old, new in CASES.items()}
FACTS = {"not asked": "skipped"}
KEYS = {"pictures": "images", "picture": "difference"}  # of exhibits and goldens


def upgraded_parity(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return parity.json in the current names; documents of other formats are returned unchanged."""
    if document.get("format") != 1:
        return dict(document)
    found = {**document, "format": 2}
    found["verdict"] = _new(VERDICTS, document.get("verdict"))
    first = document.get("first difference")
    if isinstance(first, str) and ": " in first:
        place, _, case = first.partition(": ")
        found["first difference"] = f"{PLACES.get(place, place)}: {_case(case)}"
    if isinstance(gates := document.get("gates"), list):
        found["gates"] = [_gate(gate) for gate in gates]
    for key, names in (("not run", PLACES), ("facts", FACTS)):
        if isinstance(value := document.get(key), Mapping):
            found[key] = {names.get(name, name): fact for name, fact in value.items()}
    return found


def upgraded_keys(document: Any) -> Any:
    """Return a golden or exhibits.json in the current names, at any depth; other formats are returned unchanged."""
    if not isinstance(document, dict) or document.get("format") != 1:
        return document
    found = _renamed(document)
    for case in found.get("cases", ()) if isinstance(found.get("cases"), list) else ():
        if isinstance(case, dict) and "name" in case:
            case["name"] = _case(case["name"])
    return found


def _renamed(value: Any) -> Any:
    if isinstance(value, dict):
        return {KEYS.get(key, key): _renamed(inner) for key, inner in value.items()}
    return [_renamed(inner) for inner in value] if isinstance(value, list) else value


def _gate(gate: Any) -> Any:
    if not isinstance(gate, Mapping):
        return gate
    return {**gate, "place": _new(PLACES, gate.get("place")), "case": _case(gate.get("case"))}


def _case(name: Any) -> Any:
    """Rename a case, whose name a layer, a DeepStack level or a span of tokens may follow."""
    if not isinstance(name, str):
        return name
    head, comma, rest = name.partition(",")
    return f"{CASES.get(head, head)}{comma}{rest}"


def _new(names: Mapping[str, str], old: Any) -> Any:
    return names.get(old, old) if isinstance(old, str) else old
