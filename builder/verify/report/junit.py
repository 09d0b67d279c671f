"""Render a report as JUnit XML: one testcase per gate; places that were not run are skipped."""

from __future__ import annotations

from xml.etree import ElementTree

from builder.util.text import clean, figure
from builder.verify.report.context import Context
from builder.verify.report.gates import Report
from builder.verify.report.summary import failures, headline, measured


def junit(report: Report, context: Context) -> str:
    """Return the text of junit.xml; a report without gates is a failure."""
    suites = ElementTree.Element("testsuites", name="verification")
    failing = len(failures(report)) if report.gates else 1
    counts = {
        "tests": str((len(report.gates) or 1) + len(report.not_run)),
        "failures": str(failing),
        "errors": "0",
        "skipped": str(len(report.not_run)),
        "time": f"{sum(stage.seconds for stage in context.stages if stage.name == 'verify'):.3f}",
    }
    suites.attrib.update(counts)
    suite = ElementTree.SubElement(suites, "testsuite", {"name": clean(report.target), **counts})
    properties = ElementTree.SubElement(suite, "properties")
    versions = report.facts.get("versions")
    facts = {"checkpoint": report.checkpoint, "verdict": report.verdict}
    for name, value in (facts | (versions if isinstance(versions, dict) else {})).items():
        ElementTree.SubElement(properties, "property", name=clean(name), value=clean(value))
    for gate in report.gates:
        case = _testcase(suite, report, gate.place, gate.case)
        if not gate.ok:
            failure = ElementTree.SubElement(case, "failure", type="gate", message=clean(measured(gate)))
            figures = f"measured: {figure(gate.measured)}\nlimit: {figure(gate.limit)}"
            failure.text = clean(f"{gate.place}: {gate.case}\n{figures}\n{gate.detail}")
    if not report.gates:
        failure = ElementTree.SubElement(_testcase(suite, report, "gates", "none"), "failure", type="gate")
        failure.attrib["message"] = headline(report)
    for place, why in report.not_run.items():
        ElementTree.SubElement(_testcase(suite, report, place, "all"), "skipped", message=clean(f"not run: {why}"))
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"


def _testcase(suite: ElementTree.Element, report: Report, place: str, case: str) -> ElementTree.Element:
    name = " ".join(clean(f"{place}/{case}").split())
    return ElementTree.SubElement(suite, "testcase", classname=clean(report.target), name=name, time="0")
