"""Documents of an earlier release are read through a mapping of names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builder.bundle.evidence import read_parity, worst_figures
from builder.bundle.format1 import CASES, PLACES, VERDICTS, upgraded_keys, upgraded_parity
from builder.reference.cases import shipped_cases
from builder.verify.golden.file import read_golden, text
from builder.verify.golden.record import case_digest
from builder.verify.report.formats import exhibits_text, parity_text, read_report
from builder.verify.report.gates import PLACES as PRESENT
from tests.helpers.checkpoints import MINIATURE
from tests.helpers.reports import in_slices

OLD_PLACES = {new: old for old, new in PLACES.items()}
OLD_VERDICTS = {new: old for old, new in VERDICTS.items()}
OLD_CASES = {new: old for old, new in CASES.items()}


def older(document: dict[str, object]) -> dict[str, object]:
    """A parity.json of format 1 with the same findings."""
    found = json.loads(json.dumps(document))
    for gate in found["gates"]:
        gate["place"] = OLD_PLACES.get(gate["place"], gate["place"])
        head, comma, rest = gate["case"].partition(",")
        gate["case"] = OLD_CASES.get(head, head) + comma + rest
    found["not run"] = {OLD_PLACES.get(name, name): why for name, why in found["not run"].items()}
    return {**found, "format": 1, "verdict": OLD_VERDICTS.get(found["verdict"], found["verdict"])}


def test_every_present_name_is_a_place_and_no_old_one_is() -> None:
    assert set(PLACES.values()) <= set(PRESENT)
    assert not set(PLACES) & set(PRESENT)


def test_a_report_of_format_1_is_read_in_the_present_names(tmp_path: Path) -> None:
    report = in_slices()
    assert report.verdict == "partial"
    evidence = tmp_path / "evidence"
    evidence.mkdir()
    (evidence / "parity.json").write_text(json.dumps(older(json.loads(parity_text(report)))))
    exhibits = exhibits_text(report).replace('"format":2', '"format":1').replace('"images":', '"pictures":')
    (evidence / "exhibits.json").write_text(exhibits.replace('"difference":', '"picture":'))
    assert read_report(evidence) == report
    parity = read_parity(tmp_path)
    assert parity is not None
    assert parity["verdict"] == "partial"
    assert set(worst_figures(parity)) <= {*PRESENT, *report.not_run}


def test_names_of_cases_keep_what_follows_them() -> None:
    gate = {"place": "task", "case": "one picture, tokens 0–77, layer 0"}
    found = upgraded_parity({"format": 1, "verdict": "sliced", "gates": [gate, 3], "not run": {"task": "why"}})
    assert found["gates"] == [{"place": "held-out accuracy", "case": "one image, tokens 0–77, layer 0"}, 3]
    assert (found["verdict"], found["not run"]) == ("partial", {"held-out accuracy": "why"})
    first = upgraded_parity({"format": 1, "first difference": "decoded picture: one picture"})["first difference"]
    assert first == "decoded image: one image"


@pytest.mark.parametrize("document", [{"format": 3, "pictures": 1}, {}, [], None])
def test_another_format_is_left_as_it_is(document: object) -> None:
    assert upgraded_keys(document) == document


def test_a_golden_of_format_1_is_read_with_matching_digests(tmp_path: Path) -> None:
    present = read_golden(MINIATURE.parent / "golden.json")
    document = json.loads(text(present))
    by_name = {case.name: case for case in shipped_cases()}
    for case in document["cases"]:
        case["pictures"] = case.pop("images")
        if case["name"] in OLD_CASES:
            case["name"] = OLD_CASES[case["name"]]
    path = tmp_path / "golden.json"
    path.write_text(json.dumps({**document, "format": 1}))
    found = read_golden(path)
    assert found.format == 1
    assert [case.name for case in found.cases] == [case.name for case in present.cases]
    assert all(case_digest(by_name[case.name]) == case.digest for case in present.cases if case.name in by_name)
