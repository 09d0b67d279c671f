"""Run `onnxruntime` bundles with their pipeline: our own, or the copy in the bundle."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from builder.targets.clients import pipeline
from builder.targets.clients.pipeline import Inputs

PIPELINE = "pipeline.py"
# Errors of a bundle's copy, by name; PictureError is from an earlier release.
ERRORS: dict[str, type[ValueError]] = {
    "SettingsError": pipeline.SettingsError,
    "ImageError": pipeline.ImageError,
    "PictureError": pipeline.ImageError,
    "TextError": pipeline.TextError,
}


class PipelineRunner:
    """A `Runner` (builder/targets/runners/protocol.py) around an opened `Pipeline`.

    Args:
        module: builder.targets.clients.pipeline or the bundle's copy of it.
        opened: a `Pipeline` of that module.
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
            if type(error).__name__ not in ERRORS:
                raise
            raise ERRORS[type(error).__name__](str(error)) from error
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
    """Open a bundle, with the pipeline.py in it if it is `trusted`."""
    module = _load_module(folder / PIPELINE) if trusted else pipeline
    return PipelineRunner(module, module.Pipeline.load(folder))


def _load_module(path: Path) -> Any:
    """Load a module without leaving compiled code in the bundle, as an import would."""
    source = path.read_text(encoding="utf-8")
    module = types.ModuleType("bundled_pipeline")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look up their module there
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module
