"""An `onnxruntime` bundle through its pipeline: ours, or the copy inside the bundle."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from builder.targets.clients import pipeline
from builder.targets.clients.pipeline import Inputs

PIPELINE = "pipeline.py"
# Errors of the bundle's copy, by name; an earlier release's has PictureError.
ERRORS: dict[str, type[ValueError]] = {
    "SettingsError": pipeline.SettingsError,
    "ImageError": pipeline.ImageError,
    "PictureError": pipeline.ImageError,
    "TextError": pipeline.TextError,
}


class PipelineRunner:
    """A `Runner` (builder/targets/runners/protocol.py) around an opened `Pipeline`.

    Args:
        module: builder.targets.clients.pipeline, or the bundle's copy, whose `stream` makes text of tokens.
        opened: a `Pipeline` of it.
    """

    padding = own = not_run = None

    def __init__(self, module: Any, opened: Any) -> None:
        self._module, self._pipeline = module, opened
        self.settings, self.vision, self.tokenizer = opened.settings, opened.vision, opened.tokenizer

    @property
    def most_tokens(self) -> int:
        return int(self.settings.max_length)

    def prepare(self, prompt: str, images: Sequence[Path]) -> Inputs:
        try:
            inputs: Inputs = self._pipeline.prepare(prompt, images)
        except ValueError as error:
            raise ERRORS.get(type(error).__name__, type(error))(*error.args) from error
        return inputs

    def tokens(self, inputs: Inputs, max_new_tokens: int, min_new_tokens: int = 0) -> Iterator[int]:
        tokens: Iterator[int] = self._pipeline.generate(inputs, max_new_tokens, min_new_tokens)
        return tokens

    def stream(self, tokens: Iterator[int]) -> Iterator[str]:
        pieces: Iterator[str] = self._module.stream(self.tokenizer, tokens)
        return pieces

    def text(self, tokens: Sequence[int]) -> str:
        return str(self._pipeline.text(tokens))


def open_pipeline(folder: Path, trusted: bool) -> PipelineRunner:
    """The bundle in `folder`; where it is `trusted`, through the pipeline.py inside it."""
    module = _load_module(folder / PIPELINE) if trusted else pipeline
    return PipelineRunner(module, module.Pipeline.load(folder))


def _load_module(path: Path) -> Any:
    """The module in `path`, without the compiled copy that an import would leave in the bundle."""
    source = path.read_text(encoding="utf-8")
    module = types.ModuleType("bundled_pipeline")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where its dataclasses look for their module
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module
