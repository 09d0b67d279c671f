"""The interface of a bundle that is opened in its runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from builder.targets.clients import pipeline
from builder.targets.clients.pipeline import ImageSettings, Inputs, Settings
from builder.util.errors import BundleError


class OwnProcessor(Protocol):
    """A runtime's own image processor, which is verified in addition to ours."""

    @property
    def most_images(self) -> int | None:
        """Maximum number of images in a prompt; None if unlimited."""

    def at_target_size(self, path: Path) -> bool:
        """Return whether it gets the same pixels as ours."""

    def runtime_inputs(self, prompt: str, images: Sequence[Path]) -> tuple[Any, Inputs]:
        """Process a prompt; return the runtime's own tensors, and the same as `Inputs`."""

    def tokens_of(self, tensors: Any, seq: int, max_new_tokens: int, min_new_tokens: int = 0) -> Iterator[int]:
        """Generate greedy tokens from its own tensors of a prompt of `seq` tokens."""


class Runner(Protocol):
    """A bundle in its runtime, with exact preprocessing and greedy decoding.

    Args:
        settings, vision, tokenizer: for preprocessing in `prepare`.
        most_tokens: maximum number of prompt and generated tokens together.
        padding: a token that the runtime masks, so that prompts must not contain it.
        own: the runtime's own processor.
        not_run: why the bundle cannot generate tokens here; None if it can.
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
        """Prepare the inputs for one user turn.

        Raises:
            ImageError, TextError: of builder.targets.clients.pipeline; the model cannot process an image or the text.
        """

    def tokens(self, inputs: Inputs, max_new_tokens: int, min_new_tokens: int = 0) -> Iterator[int]:
        """Generate greedy tokens up to and including a stop token, which is never among the first `min_new_tokens`."""

    def stream(self, tokens: Iterator[int]) -> Iterator[str]:
        """Decode tokens as they arrive, without special tokens."""

    def text(self, tokens: Sequence[int]) -> str:
        """Decode tokens, without special tokens."""


class SettingsRunner:
    """A `Runner` without `tokens`, from the settings files and the tokenizer in a bundle.

    Args:
        not_run: why the bundle cannot generate tokens here; None if a subclass can.
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
    """A `Runner` for a bundle whose runtime is missing on this machine; `tokens` raises a `BundleError`."""

    def tokens(self, inputs: Inputs, max_new_tokens: int, min_new_tokens: int = 0) -> Iterator[int]:
        raise BundleError(f"{self.folder} cannot run here", found=self.not_run, next="run it on another machine")
