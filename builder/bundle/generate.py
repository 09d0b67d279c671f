"""Generate text with a bundle, from a prompt and image files, with this project's own exact preprocessing.

Decoding is greedy whatever the bundle's generation settings say. A bundle for `onnxruntime` is run by the pipeline.py
that it contains. That is code: run only bundles that you trust.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from builder.bundle.layout import check_bundle
from builder.targets.clients import pipeline
from builder.targets.clients.pipeline import Inputs
from builder.targets.runners.protocol import Runner
from builder.targets.runners.registry import RUNTIMES
from builder.util.errors import BuildError, BundleError, ImageError, MissingPackageError, PromptError


@dataclass(frozen=True)
class GeneratedText:
    """Generated text without special tokens; `token_ids` are the generated tokens with the stop token."""

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
    """Generate an answer to a prompt, streaming its text.

    Args:
        on_text: called with each piece of the answer; the pieces concatenate to its text.

    Raises:
        BundleError: `bundle` is not a bundle, or its runtime cannot open it.
        ImageError: a file is not an image, or the model does not support the image.
        PromptError: the model does not support the text, or prompt and answer exceed its length.
        MissingPackageError: the bundle's runtime is not installed.
    """
    runner = open_bundle(bundle)
    with _in_use(bundle, "cannot prepare the prompt"):
        inputs = _prepare(runner, prompt, images)
    _check_length(inputs.input_ids.shape[1], max_new_tokens, runner.most_tokens)
    tokens: list[int] = []
    pieces: list[str] = []
    stream = runner.stream(_recorded(runner.tokens(inputs, max_new_tokens), tokens))
    while True:
        with _in_use(bundle, "failed while generating"):
            piece = next(stream, None)
        if piece is None:
            break
        pieces.append(piece)
        on_text(piece)
    return GeneratedText("".join(pieces), tuple(tokens), inputs.input_ids.shape[1])


def open_bundle(folder: Path) -> Runner:
    """Open a bundle in the runtime that its manifest names.

    Raises:
        BundleError: `folder` is not a bundle, its target is unknown, or the runtime cannot open its files.
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
    """Raise errors of a bundle's runtime, tokenizer or own code as `BundleError`."""
    try:
        yield
    except BuildError:
        raise
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise MissingPackageError(f"running {folder} needs {package}", next=f"pip install {package}") from error
    # Runtimes have their own errors for broken graphs; those of tokenizers do not derive from `Exception`.
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        raise BundleError(
            f"{folder} {what}",
            found=f"{type(error).__name__}: {error}",
            next="build it again with `qwen3vl-onnx build`",
        ) from error


def _prepare(runner: Runner, prompt: str, images: Sequence[Path]) -> Inputs:
    try:
        inputs = runner.prepare(prompt, images)
    except pipeline.ImageError as error:
        raise ImageError(str(error), next="give another file: PNG, JPEG, WebP …") from error
    except pipeline.TextError as error:
        raise PromptError(str(error), next="remove it from the prompt") from error
    if runner.padding is not None and runner.padding in inputs.input_ids:
        token = runner.tokenizer.id_to_token(runner.padding)
        raise PromptError(
            f"the text contains {token}, which the runtime treats as padding",
            next="remove it from the prompt",
        )
    return inputs


def _check_length(seq: int, max_new_tokens: int, most: int) -> None:
    if seq + max_new_tokens > most:
        raise PromptError(
            "prompt and answer may exceed the model's length",
            expected=f"at most {most} tokens together",
            found=f"{seq} tokens of prompt, {max_new_tokens} of answer",
            next=f"--max-new-tokens {most - seq}" if seq < most else "give fewer or smaller images",
        )


def _recorded(tokens: Iterable[int], into: list[int]) -> Iterator[int]:
    for token in tokens:
        into.append(token)
        yield token
