"""A bundle that was opened in its own runtime, whichever that is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from builder.targets.clients import pipeline
from builder.targets.clients.pipeline import ImageSettings, Inputs, Settings
from builder.util.errors import BundleError


class OwnProcessor(Protocol):
    """A runtime's own image processor, where it has one that is verified next to ours."""

    @property
    def most_images(self) -> int | None:
        """Images of one prompt at most; None for any number."""

    def at_target_size(self, path: Path) -> bool:
        """Whether it sees the bytes that ours sees."""

    def runtime_inputs(self, prompt: str, images: Sequence[Path]) -> tuple[Any, Inputs]:
        """What it makes, as it is and as `Inputs`."""

    def tokens_of(self, tensors: Any, seq: int, max_new_tokens: int, min_new_tokens: int = 0) -> Iterator[int]:
        """Greedy tokens from what it made of a prompt of `seq` tokens."""


class Runner(Protocol):
    """A bundle in its own runtime; `prepare` and `tokens` are its exact preprocessing and its greedy decoding.

    Args:
        settings, vision, tokenizer: what `prepare` makes inputs by.
        most_tokens: of prompt and answer together.
        padding: a token that the runtime masks, so that no prompt may contain it.
        own: the runtime's own processor.
        not_run: why there are no tokens; None where there are.
    """

    @property
    def settings(self) -> Settings: ...

    @property
    def vision(self) -> ImageSettings: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def most_tokens(self) -> int: ...

    @property
    def padding(self) -> int | None: ...

    @property
    def own(self) -> OwnProcessor | None: ...

    @property
    def not_run(self) -> str | None: ...

    def prepare(self, prompt: str, images: Sequence[Path]) -> Inputs:
        """
        Raises:
            builder.targets.clients.pipeline.ImageError, TextError: an image, or a text, that the model cannot take.
        """

    def tokens(self, inputs: Inputs, max_new_tokens: int, min_new_tokens: int = 0) -> Iterator[int]:
        """Greedy tokens as they come, the stop token included; the first `min_new_tokens` are not stop tokens."""

    def stream(self, tokens: Iterator[int]) -> Iterator[str]:
        """The text of tokens as they come, without special tokens."""

    def text(self, tokens: Sequence[int]) -> str:
        """Without special tokens."""


class SettingsRunner:
    """A `Runner` but for its tokens: inputs and texts by the settings, the tokenizer and the image settings.

    Args:
        not_run: why there are no tokens; None where a subclass gives them.
    """

    padding: int | None = None

    def __init__(self, folder: Path, not_run: str | None = None) -> None:
        self.folder, self.not_run = folder, not_run
        self.settings = pipeline.read_settings(folder / "pipeline.json")
        self.vision = pipeline.read_image_settings(folder / "vision_processor.json")
        self.tokenizer = pipeline.load_tokenizer(folder / "tokenizer.json")

    @property
    def most_tokens(self) -> int:
        return self.settings.max_length

    @property
    def own(self) -> OwnProcessor | None:
        return None

    def prepare(self, prompt: str, images: Sequence[Path]) -> Inputs:
        return pipeline.prepare(prompt, images, self.tokenizer, self.settings, self.vision)

    def stream(self, tokens: Iterator[int]) -> Iterator[str]:
        return pipeline.stream(self.tokenizer, tokens)

    def text(self, tokens: Sequence[int]) -> str:
        return "".join(pipeline.stream(self.tokenizer, tokens))


class NotRun(SettingsRunner):
    """A bundle whose runtime is missing on this machine."""

    def tokens(self, inputs: Inputs, max_new_tokens: int, min_new_tokens: int = 0) -> Iterator[int]:
        raise BundleError(f"{self.folder} cannot run here", found=self.not_run, next="run it on another machine")
