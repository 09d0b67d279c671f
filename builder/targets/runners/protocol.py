"""A bundle in the runtime that it is for, whichever that is.

In: a bundle's folder and its target. Out: a `Player`. Guaranteed: where the runtime cannot be played on this machine
there is a `Player` all the same, which makes inputs and says why it gives no tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from builder.targets.clients import pipeline
from builder.targets.clients.pipeline import ImageSettings, Inputs, Settings, SettingsError
from builder.targets.registry import TARGETS
from builder.util.errors import BundleError


class OwnProcessor(Protocol):
    """A runtime's own image processor, where it has one that is verified beside ours."""

    @property
    def most_images(self) -> int | None:
        """Of a question; None for any number."""

    def at_target_size(self, path: Path) -> bool:
        """Whether it sees the bytes that ours sees."""

    def runtime_inputs(self, prompt: str, images: Sequence[Path]) -> tuple[Any, Inputs]:
        """What it makes, as it is and as `Inputs`."""

    def tokens_of(self, tensors: Any, seq: int, max_new_tokens: int, min_new_tokens: int = 0) -> Iterator[int]:
        """Greedy tokens from what it made of a prompt of `seq` tokens."""


class Player(Protocol):
    """A bundle in its own runtime; `prepare` and `tokens` are its exact preprocessing and its greedy answer.

    Args:
        module: the pipeline that `prepare` is of, with `stream` and the errors that it raises.
        settings, vision, tokenizer: what `prepare` makes inputs by.
        most_tokens: of prompt and answer together.
        padding: a token that the runtime masks, so that no prompt may hold it.
        own: the runtime's own processor.
        not_run: why there are no tokens; None where there are.
    """

    @property
    def module(self) -> Any: ...

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

    def prepare(self, prompt: str, images: Sequence[Path]) -> Inputs: ...

    def tokens(self, inputs: Inputs, max_new_tokens: int, min_new_tokens: int = 0) -> Iterator[int]: ...

    def text(self, tokens: Sequence[int]) -> str: ...


class Unplayed:
    """A bundle whose runtime is not here: inputs from its settings, texts, and no tokens.

    One whose runtime is not in this process gives tokens besides, and has no `not_run`.
    """

    module: Any = pipeline
    padding: int | None = None

    def __init__(self, folder: Path, not_run: str | None) -> None:
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

    def text(self, tokens: Sequence[int]) -> str:
        """Without special tokens."""
        return "".join(pipeline.stream(self.tokenizer, tokens))

    def tokens(self, inputs: Inputs, max_new_tokens: int, min_new_tokens: int = 0) -> Iterator[int]:
        raise BundleError(f"{self.folder} cannot be played here", found=self.not_run, next="play it on another machine")


def check_target(folder: Path, target: str) -> None:
    """
    Raises:
        BundleError: no runtime of that name is known.
    """
    if target not in TARGETS:
        raise BundleError(f"{folder} is for the target {target!r}", expected=" or ".join(TARGETS), found=target)


def open_player(folder: Path, target: str) -> Player:
    """The bundle in `folder`, opened in the runtime of `target`; no program that lies in it is run.

    Raises:
        BundleError: an unknown target, or settings that cannot be carried out.
    """
    check_target(folder, target)
    try:
        why = TARGETS[target].needs()
        return Unplayed(folder, why) if why else TARGETS[target].play(folder, False)
    except SettingsError as error:
        raise BundleError(f"the settings in {folder} cannot be carried out", found=str(error)) from error
