"""Test the pages: order of content, no scripts or external resources, readable by CI servers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from builder.util.text import clean, code, figure
from builder.verify.report.context import Context, MeasuredStage, of_bundle
from builder.verify.report.exhibits import Exhibit
from builder.verify.report.gates import Gate, Report
from builder.verify.report.html import bar, html
from builder.verify.report.junit import junit
from builder.verify.report.markdown import MAX_CHARACTERS, markdown
from builder.verify.report.summary import failures, margin, measured, places
from tests.helpers.reports import (
    CONTEXT,
    FACTS,
    FAILS,
    HARM,
    HOLDS,
    failing,
    harmful,
    harmful_context,
    in_slices,
    passing,
)

ALL = {"passing": passing, "failing": failing, "in slices": in_slices, "harmful": harmful}
VOID = {"meta", "img", "br", "link", "input", "hr", "path", "circle", "rect"}


class Page(HTMLParser):
    """Collects elements with their attributes and all text, and checks that elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.mark.parametrize("name", ALL)
def test_a_page_is_complete_and_loads_nothing(name: str) -> None:
    text = html(ALL[name](), harmful_context() if name == "harmful" else CONTEXT)
    page = Page(text)
    assert page.open == []
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on")], (tag, attributes)
        for key in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            address = attributes.get(key)
            assert address is None or re.match("data:image/(png|jpeg);base64,", address), (tag, attributes)
    outside = text if name != "harmful" else re.sub("&lt;.*?&gt;", "", text)
    assert not re.search(r"""(url\(|@import|(src|href)\s*=\s*["']?\s*(https?:|//))""", outside)
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_names_from_a_bundle_are_escaped() -> None:
    text = html(harmful(), harmful_context())
    page = Page(text)
    assert "<script" not in text
    assert "{{ 7*7 }}" in page.text
    assert "49" not in re.findall(r"\b49\b", page.text)
    assert page.text.count("<script>alert(1)</script>") > 10
    assert not set(text) & {"\x00", "\x07", "\x1b", "\u202e", "\ud800"}
    text.encode("utf-8")


def test_images_are_inline_data() -> None:
    images = [a for tag, a in Page(html(harmful(), CONTEXT)).elements if tag == "img"]
    assert images
    assert all((image["src"] or "").startswith("data:image/") for image in images)


def test_the_verdict_comes_first_then_the_first_difference() -> None:
    page = Page(html(failing(), CONTEXT)).text
    where = [page.index(words) for words in ("Failed", "First difference: decoder layers", "Where it was compared")]
    assert where == sorted(where)
    assert page.index("tokens 0–77, layer 1") < where[2]
    assert "2.0e-02 of a deviation at [5, 1]" in page
    assert "200× over" in page
    assert "First difference" not in Page(html(passing(), CONTEXT)).text
    assert Page(html(in_slices(), CONTEXT)).text.count("not run: needs 17.8 GB of memory, there are 8.0 GB") == 1


def test_answers_that_differ_come_before_those_that_are_equal() -> None:
    shown = (
        Exhibit("equal", "task", "Which?", answers=("one", "one")),
        Exhibit("other", "task", "Which?", answers=("one", "two")),
    )
    page = Page(html(replace(passing(), exhibits=shown), CONTEXT)).text
    assert page.index("✗ differs") < page.index("✓ equal")


def test_color_never_carries_meaning_alone() -> None:
    """Each row and each answer has a sign and a word in addition to its color."""
    page = Page(html(failing(), CONTEXT)).text
    for place in places(failing()):
        assert f"{'✓' if place.ok else '✗'} {place.name} : {'pass' if place.ok else 'FAIL'}" in page
    text = html(failing(), CONTEXT)
    assert 'class="cross"' in text
    assert 'class="cross"' not in html(passing(), CONTEXT)


def test_unknown_facts_are_reported() -> None:
    page = Page(html(Report("genai", "miniature", HOLDS, {}), Context())).text
    assert "Not known: this report has no records of the build." in page
    assert "No logits were sampled." in page
    assert "No distributions were compared." in page
    assert "This report has none." in page
    assert "export" in Page(html(passing(), CONTEXT)).text
    assert "not known" in Page(html(passing(), CONTEXT)).text  # the memory of one stage


def test_cases_that_were_not_run_or_only_in_part_are_named() -> None:
    facts = {"not checked": {"many patches": ["decoder", "tokens"]}}
    report = replace(passing(), facts=facts, not_run={"a photo": "decoded in another way"})
    page, comment = Page(html(report, CONTEXT)).text, markdown(report, CONTEXT)
    assert "a photo not run: decoded in another way" in page
    assert "Not compared for the case many patches , as its file requests: decoder, tokens" in page
    assert "| <code>a photo</code> | | | | not run | <code>decoded in another way</code> |" in comment
    assert "<code>many patches</code>: <code>decoder&#44; tokens</code>" in comment
    assert "a photo/all" in junit(report, CONTEXT)


def test_a_report_without_gates_can_be_shown() -> None:
    empty = Report("genai", "miniature", (), {})
    assert "nothing was compared" in html(empty, Context())
    assert "FAILED" in markdown(empty, Context())
    suite = ElementTree.fromstring(junit(empty, Context()))
    assert (suite.attrib["tests"], suite.attrib["failures"]) == ("1", "1")


@pytest.mark.parametrize("name", ALL)
def test_junit_can_be_parsed(name: str) -> None:
    report = ALL[name]()
    root = ElementTree.fromstring(junit(report, CONTEXT))
    (suite,) = root
    cases = suite.findall("testcase")
    failed = [case for case in cases if case.find("failure") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    assert (len(failed), len(skipped)) == (len(failures(report)), len(report.not_run))
    assert len(cases) == len(report.gates) + len(report.not_run)
    for element in (root, suite):
        assert element.attrib["tests"] == str(len(cases))
        assert element.attrib["failures"] == str(len(failed))
        assert element.attrib["skipped"] == str(len(skipped))
    for gate, case in zip(report.gates, cases, strict=False):
        assert case.attrib["name"] == " ".join(clean(f"{gate.place}/{gate.case}").split())
        if not gate.ok:
            assert case[0].attrib["message"] == measured(gate)
            assert f"limit: {figure(gate.limit)}" in (case[0].text or "")


def test_markdown_starts_with_the_verdict_and_the_first_difference() -> None:
    lines = [line for line in markdown(failing(), CONTEXT).splitlines() if line]
    assert lines[0] == "### ❌ <code>genai</code> of <code>miniature</code>: FAILED"
    assert lines[1] == "Does not equal PyTorch: 5 of 16 comparisons fail."
    assert lines[2].startswith("**First difference: decoder layers**, ")
    assert lines[2].endswith("0.02, limit 1.0e-04 (200× over)")
    rows = [line for line in lines if line.startswith(("| ✅", "| ❌", "| ⏭️"))]
    assert [row.split(" | ")[1] for row in rows] == [place.name for place in places(failing())]
    assert markdown(failing(), CONTEXT).count("<details>") == markdown(failing(), CONTEXT).count("</details>") >= 4
    assert "needs 17&#46;8 GB" in markdown(in_slices(), CONTEXT)


def test_markdown_has_no_markup_from_names() -> None:
    """Outside our own tags no character of a name is interpreted by Markdown, HTML or GitHub."""
    text = markdown(harmful(), harmful_context())
    for found in re.findall(r"<code>(.*?)</code>", text):
        assert re.fullmatch(r"(?:[^\W_]|[ \x80-\U0010ffff]|&#\d+;)*", found), found
    rest = re.sub(r"<code>.*?</code>", "", text)
    assert not re.search("script|alert|someone|example|heading", rest)
    assert not set(text) & {"\x00", "\x1b", "\u202e", "\ud800"}
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count("|") == line.replace("\\|", "").count("|")
    assert code("a|b\nc") == "<code>a&#124;b c</code>"
    assert code("") == ""


def test_markdown_fits_a_comment_whatever_fails() -> None:
    gates = tuple(Gate("decoder layers", f"{HARM} {n}, layer {n}", 1.0, 1e-4, HARM * 3, n) for n in range(2000))
    shown = tuple(Exhibit(HARM, "task", HARM, answers=(HARM, HARM + "!")) for _ in range(300))
    text = markdown(Report("genai", HARM, gates, FACTS, exhibits=shown), harmful_context())
    assert len(text) <= MAX_CHARACTERS == 65_000
    assert re.search(r"… and \d+ more, in report\.html\.", text)
    assert text.count("<details>") == text.count("</details>")


@pytest.mark.parametrize(
    ("gate", "words", "width"),
    [
        (Gate("embeddings", "a", 1e-5, 1e-4), "10× below", 52.5),
        (Gate("embeddings", "a", 1e-4, 1e-4), "1.0× below", 70.0),
        (Gate("embeddings", "a", 1e-3, 1e-4), "10× over", 80.0),
        (Gate("embeddings", "a", 1e9, 1e-4), "1e13× over", 100.0),
        (Gate("embeddings", "a", 1e-30, 1e-4), None, 2.0),
        (Gate("embeddings", "a", 0, 1e-4), "exact", 0.0),
        (Gate("token ids", "a", 0, 0), "exact", 0.0),
        (Gate("token ids", "a", 1204, 0), "1,204 differ", 100.0),
        (Gate("embeddings", "a", float("nan"), 1e-4), "not comparable", 100.0),
        (Gate("tokens", "near ties", 1, 2), "1 differ", 64.7),
    ],
)
def test_margins_in_words_and_as_bars(gate: Gate, words: str | None, width: float) -> None:
    assert words in (None, margin(gate))
    assert bar(gate) == pytest.approx(width, abs=3)
    assert (bar(gate) <= 70) == gate.ok


def test_the_worst_case_is_the_closest_to_its_limit() -> None:
    (row,) = places(Report("genai", "m", (Gate("tokens", "a", 0, 0), Gate("tokens", "near ties", 1, 2)), {}))
    assert row.worst is not None
    assert row.worst.case == "near ties"
    assert [gate.place for gate in failures(failing())] == [
        *("decoder layers", "decoder prefill", "decoder step", "tokens", "held-out accuracy")
    ]
    assert len(FAILS) == 5
    assert Gate("tokens", "a", 1, 0).excess == float("inf")


def test_the_self_test_is_shown_whatever_columns_it_has(tmp_path: Path) -> None:
    found = {
        "verdict": "failed",
        "mutants": [
            {"name": "pixel mean", "status": "caught", "measured": 131072.0, "limit": 0.0, "detail": "not shown"},
            {"name": "layers", "status": "lives", "measured": 2e-5, "expected": ["decoder layers", "tokens"]},
        ],
        "survivors": [{"place": HARM.replace("\ud800", ""), "passes": None}],
        "other": [3, "text"],
    }
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence" / "self_test.json").write_text(json.dumps(found))
    (tmp_path / "manifest.json").write_text("{}")
    context = of_bundle(tmp_path)
    assert [table.title for table in context.self_test] == ["Mutants", "Thresholds"]
    assert context.self_test[0].columns == ("name", "status", "measured", "limit", "expected")
    assert context.self_test[0].rows == (
        ("pixel mean", "✓ caught", "131,072", "0", ""),
        ("layers", "✗ lives", "2.0e-05", "", "decoder layers, tokens"),
    )
    page = Page(html(passing(), context)).text
    assert "Would it have been caught?" in page
    assert "✗ lives" in page
    assert "✗ lives" in re.sub(r"&#(\d+);", lambda code: chr(int(code[1])), markdown(passing(), context))


def test_a_manifest_with_wrong_types_does_not_fail_a_report(tmp_path: Path) -> None:
    malformed = {
        "checkpoint": 3,
        "recipe": ["x"],
        "patches": {"a": 1},
        "versions": "none",
        "files": {"b": None, "c": {"size": "x"}},
    }
    (tmp_path / "manifest.json").write_text(json.dumps({**malformed, "target": {"a": 1}}))
    (tmp_path / "evidence" / "stages").mkdir(parents=True)
    (tmp_path / "evidence" / "stages" / "export.json").write_text('{"cost": {"wall_s": "long", "peak_rss": -1}}')
    (tmp_path / "evidence" / "stages" / "verify.json").write_text('{"cost": {"wall_s": 1e999, "peak_rss": 5}}')
    (tmp_path / "evidence" / "self_test.json").write_text('["nothing"]')
    context = of_bundle(tmp_path)
    assert (context.stages, context.self_test) == ((), ())
    assert Page(html(passing(), context)).open == []
    (tmp_path / "manifest.json").write_text("no json")
    assert [name for name, _ in of_bundle(tmp_path).facts] == ["manifest.json"]


def test_costs_are_bars_relative_to_the_largest() -> None:
    stages = (MeasuredStage("export", 30.0, 200), MeasuredStage("verify", 60.0, 100))
    widths = re.findall(r'class="cost" style="width:([\d.]+)%"', html(passing(), Context(stages=stages)))
    assert widths == ["50.0", "100.0", "100.0", "50.0"]
