"""Split a chat template into three strings that a program in any language can join.

Guarantees: prefix + image * n + text + suffix is what transformers' `apply_chat_template` renders for a user turn of n
images and a text, followed by the generation prompt. A template that differs on any of `PROBES` is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from builder.checkpoint.files import TOKENIZER, TOKENIZER_CONFIG
from builder.checkpoint.load import Checkpoint
from builder.util.errors import CheckpointError, PromptError
from builder.util.json_files import read_json
from builder.util.limited_process import LimitError, run_limited

# Texts that a template might trim, escape, evaluate or interpret. The first splits the rendered turn, so it must not
# occur in a template.
PROBES = (
    "Größe, 数字, नमस्ते, e\u0301, \U0001f642\u200d\u2194\ufe0f",
    "Read the number.",
    "  spaces around  ",
    "\n\nlines\n\n\nand a last one\n",
    "{{ messages }} {% if x %} {# note #} {0} ${x}",
    "<b>&amp;</b> \"double\" 'single' \\n",
    "<think>so</think> <tool_response>so</tool_response>",
    "user\nassistant\nsystem\nImage 1: image",
    "",
)
MOST_IMAGES = 3
# Limits on splitting, which takes about 100 MB and one or two seconds, nearly all of them for imports.
SECONDS, MEMORY = 10, 400 * 2**20
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def split_template(checkpoint: Checkpoint) -> dict[str, str]:
    """Split the checkpoint's chat template, in a process with limits, as a template is a program.

    Returns:
        `{"prefix", "image", "suffix"}`.

    Raises:
        CheckpointError: no template, or the tokenizer does not have the image token.
        PromptError: see `split`; or the template takes too much time or memory.
    """
    image_token = token_text(checkpoint, checkpoint.image_token_id)
    return dict(_split_limited(checkpoint.chat_template, image_token, tuple(special_tokens(checkpoint).items())))


@cache
def _split_limited(template: str, image_token: str, variables: tuple[tuple[str, str], ...]) -> dict[str, str]:
    try:
        return run_limited(split, template, image_token, dict(variables), seconds=SECONDS, memory=MEMORY)
    except LimitError as error:
        raise PromptError(
            "the chat template cannot be rendered",
            expected=f"at most {SECONDS} s of work and {MEMORY // 2**20} MB of memory",
            found=error,
        ) from error


def token_text(checkpoint: Checkpoint, token_id: int) -> str:
    """Return the text of an added token of the tokenizer.

    Raises:
        CheckpointError: tokenizer.json has no such token.
    """
    for token in read_json(checkpoint.folder / TOKENIZER).get("added_tokens") or ():
        if token["id"] == token_id:
            return str(token["content"])
    raise CheckpointError(
        f"{TOKENIZER} has no added token {token_id}, which {checkpoint.folder / 'config.json'} names",
        next=f"copy {TOKENIZER} from the checkpoint that this one was made from",
    )


def special_tokens(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the special tokens that a template may use as variables.

    Raises:
        CheckpointError: tokenizer_config.json is missing, or a token is not a string.
    """
    config = read_json(checkpoint.folder / TOKENIZER_CONFIG)
    tokens = {name: config[name] for name in SPECIAL if config.get(name) is not None}
    texts: dict[str, str] = {}
    for name, token in tokens.items():
        text = token.get("content") if isinstance(token, Mapping) else token
        if not isinstance(text, str):
            raise CheckpointError(f"{TOKENIZER_CONFIG}: {name} is not a token", expected="a string", found=token)
        texts[name] = text
    return texts


def split(template: str, image_token: str, variables: Mapping[str, str]) -> dict[str, str]:
    """Split a template.

    Args:
        template: Jinja source.
        image_token: the token that `image` must contain exactly once.
        variables: of the template, besides messages, tools, documents and add_generation_prompt.

    Returns:
        `{"prefix", "image", "suffix"}`.

    Raises:
        PromptError: the template does not render, or not as prefix + image * n + text + suffix.
    """
    compiled = compile_template(template)
    first = PROBES[0]
    plain, with_image = (render(compiled, first, images, variables) for images in (0, 1))
    prefix, separator, suffix = plain.partition(first)
    if not separator or first in suffix:
        raise _not_split("does not write the text exactly once", f"…{first}…", plain)
    image = with_image.removeprefix(prefix).removesuffix(first + suffix)
    if image.count(image_token) != 1 or image_token in prefix + suffix:
        raise _not_split(f"does not write {image_token} exactly once per image", image_token, with_image)
    for text in PROBES:
        for images in range(MOST_IMAGES + 1):
            expected = prefix + image * images + text + suffix
            rendered = render(compiled, text, images, variables)
            if rendered != expected:
                raise _not_split(f"treats {images} images and the text {text!r} differently", expected, rendered)
    return {"prefix": prefix, "image": image, "suffix": suffix}


def _not_split(why: str, expected: str, found: str) -> PromptError:
    return PromptError(
        f"the chat template {why}; a bundle requires the form prefix + images + text + suffix",
        expected=repr(expected),
        found=repr(found),
        next="give the checkpoint a chat_template.jinja that writes images and text unchanged and in order",
    )


def compile_template(template: str) -> Any:
    """Compile a template in the sandbox that transformers renders chat templates in.

    Raises:
        PromptError: Jinja does not compile it.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template)
    except Exception as error:  # Jinja compiles to Python, which has limits and errors of its own
        raise PromptError(
            "the chat template is not a Jinja template",
            expected="a template that Jinja compiles",
            found=f"{type(error).__name__}: {error}",
        ) from error


def render(compiled: Any, text: str, images: int, variables: Mapping[str, str]) -> str:
    """Render one user turn: `images` images, then the text, then the generation prompt.

    Raises:
        PromptError: the template fails.
    """
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]
    turn = {
        "messages": [{"role": "user", "content": content}],
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
    }
    try:
        return str(compiled.render(**variables, **turn))
    except Exception as error:  # a template can fail as any program can
        raise PromptError(
            f"the chat template cannot be rendered for {images} images and a text",
            found=f"{type(error).__name__}: {error}",
        ) from error


class _Generation(Extension):
    """Ignore the tag `{% generation %}`, which marks the assistant's tokens for training."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replace Jinja's own filter, which escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> NoReturn:
    # A bundle would contain its build date, and rebuilding it a day later would give other bytes.
    raise TemplateError(f"it writes today's date ({form}), which a bundle cannot")
