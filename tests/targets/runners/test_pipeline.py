"""Errors of a bundle's own pipeline.py, which may be an earlier release's, are ours."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from builder.targets.clients import pipeline
from builder.targets.runners.pipeline import PipelineRunner


def runner(error: ValueError) -> PipelineRunner:
    def prepare(prompt: str, images: Any) -> Any:
        raise error

    opened = SimpleNamespace(prepare=prepare, settings=None, vision=None, tokenizer=None)
    return PipelineRunner(SimpleNamespace(), opened)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("PictureError", pipeline.ImageError), ("ImageError", pipeline.ImageError), ("TextError", pipeline.TextError)],
)
def test_errors_are_recognized_by_name(name: str, expected: type[ValueError]) -> None:
    theirs = type(name, (ValueError,), {})
    with pytest.raises(expected, match="too narrow") as caught:
        runner(theirs("too narrow")).prepare("What?", [])
    assert type(caught.value) is expected


def test_another_error_stays_as_it_is() -> None:
    error = json.JSONDecodeError("no JSON", "{", 0)
    with pytest.raises(json.JSONDecodeError) as caught:
        runner(error).prepare("What?", [])
    assert caught.value is error
