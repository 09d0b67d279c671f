"""docs/adding-a-runtime.md quotes tested code verbatim and names every field of a target."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from builder.targets.graphs import GraphSettings
from builder.targets.runners.registry import Runtime
from builder.targets.spec import Packaging
from tests.helpers.processes import ROOT

PAGE = (ROOT / "docs" / "adding-a-runtime.md").read_text(encoding="utf-8")
QUOTED = (ROOT / "tests" / "helpers" / "third_target.py").read_text(encoding="utf-8")
CODE = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_page_quotes_code() -> None:
    assert len(CODE) >= 4


@pytest.mark.parametrize("code", CODE, ids=lambda code: code.splitlines()[0].strip(" (:"))
def test_quoted_code_is_tested(code: str) -> None:
    assert code in QUOTED


def test_page_names_every_field() -> None:
    words = set(re.findall(r"\w+", PAGE))
    assert {field.name for value in (GraphSettings, Packaging, Runtime) for field in fields(value)} <= words


def test_named_files_exist() -> None:
    named = set(re.findall(r"(?:builder|tests)/[\w/]+\.(?:py|toml)", PAGE.replace("\\_", "_")))
    assert len(named) >= 8
    assert [name for name in named if not (ROOT / name).is_file()] == []
