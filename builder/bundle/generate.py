"""Ask a bundle: from a text and picture files to a streamed answer, through our own exact preprocessing.

In: a bundle, a prompt, picture files. Out: text as it comes, then an `GeneratedText`.
Guaranteed: greedy, whatever the bundle's generation settings say; one generator a question.
A bundle for `onnxruntime` is driven by the pipeline.py that lies in it. That is code: run what you trust.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from builder.bundle.layout import check_bundle
from builder.targets.clients.pipeline import Inputs, PictureError, TextError
from builder.targets.runners.protocol import Runner
from builder.targets.runners.registry import RUNTIMES
from builder.util.errors import BuildError, BundleError, ImageError, MissingPackageError, PromptError


@dataclass(frozen=True)
class GeneratedText:
    """`token_ids` are the generated ones, the stop token included; `text` is without special tokens."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int


def answer(
    bundle: Path,
    prompt: str,
    images: Sequence[Path],
    *,
    max_new_tokens: int,
    on_text: Callable[[str], None],
) -> GeneratedText:
    """One question, one answer.

    Args:
        on_text: called with each piece of the answer; the pieces together are the answer's text.

    Raises:
        BundleError: no bundle, or one that its runtime cannot open.
        ImageError: a file that is no picture, or a picture that the model cannot take.
        PromptError: a text that the model cannot take, or with its answer longer than the model takes.
        MissingPackageError: the bundle's runtime is not installed.
    """
    opened = open_bundle(bundle)
    with _in_use(bundle, "cannot prepare the prompt"):
        inputs = _prepare(opened, prompt, images)
    _check_length(inputs.input_ids.shape[1], max_new_tokens, opened.most_tokens)
    tokens: list[int] = []
    pieces: list[str] = []
    stream = opened.stream(_noted(opened.tokens(inputs, max_new_tokens), tokens))
    while True:
        with _in_use(bundle, "fails while it answers"):
            piece = next(stream, None)
        if piece is None:
            break
        pieces.append(piece)
        on_text(piece)
    return GeneratedText("".join(pieces), tuple(tokens), inputs.input_ids.shape[1])


def open_bundle(folder: Path) -> Runner:
    """A bundle in the runtime that its manifest names.

    Raises:
        BundleError: no bundle, an unknown target, or files that the runtime cannot open.
        MissingPackageError: the runtime is not installed.
    """
    target = check_bundle(folder)
    if target not in RUNTIMES:
        raise BundleError(
            f"{folder} is for a runtime that cannot be run here", expected=" or ".join(RUNTIMES), found=target
        )
    if why := RUNTIMES[target].missing():
        raise MissingPackageError(f"{folder} cannot be run here", found=why, next="install what is missing")
    with _in_use(folder, "cannot be opened"):
        return RUNTIMES[target].open(folder, True)


@contextmanager
def _in_use(folder: Path, what: str) -> Iterator[None]:
    """What a bundle's runtime, tokenizer or own code throws, as the bundle's error."""
    try:
        yield
    except BuildError:
        raise
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise MissingPackageError(f"running {folder} needs {package}", next=f"pip install {package}") from error
    # Each runtime has errors of its own for a broken graph; those of tokenizers are no `Exception`.
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        raise BundleError(
            f"{folder} {what}",
            found=f"{type(error).__name__}: {error}",
            next="build it again with `qwen3vl-onnx build`",
        ) from error


def _prepare(opened: Runner, prompt: str, images: Sequence[Path]) -> Inputs:
    try:
        inputs = opened.prepare(prompt, images)
    except PictureError as error:
        raise ImageError(str(error), next="give another file: PNG, JPEG, WebP …") from error
    except TextError as error:
        raise PromptError(str(error), next="take it out of the prompt") from error
    if opened.padding is not None and opened.padding in inputs.input_ids:
        token = opened.tokenizer.id_to_token(opened.padding)
        raise PromptError(
            f"the text holds {token}, which its runtime takes for padding",
            next="take it out of the prompt",
        )
    return inputs


def _check_length(seq: int, max_new_tokens: int, most: int) -> None:
    if seq + max_new_tokens > most:
        raise PromptError(
            "prompt and answer can become longer than the model takes",
            expected=f"at most {most} tokens together",
            found=f"{seq} tokens of prompt, {max_new_tokens} of answer",
            next=f"--max-new-tokens {most - seq}" if seq < most else "give fewer or smaller pictures",
        )


def _noted(tokens: Iterable[int], into: list[int]) -> Iterator[int]:
    for token in tokens:
        into.append(token)
        yield token
