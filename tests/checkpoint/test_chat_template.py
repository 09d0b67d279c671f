"""Chat templates, split and joined again, against transformers' rendering."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from builder.checkpoint.chat_template import PROBES, special_tokens, split, split_template, token_text
from builder.checkpoint.load import open_checkpoint
from builder.util.errors import CheckpointError, PromptError
from tests.helpers.checkpoints import MINIATURE

IMAGE = "<|image_pad|>"
FULL = """\
{%- set counted = namespace(images=0, videos=0) %}
{%- macro parts(content, count) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content %}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
                {%- if count %}{% set counted.images = counted.images + 1 %}{% endif %}
                {%- if add_vision_id %}{{ 'Image ' ~ counted.images ~ ': ' }}{% endif %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' or 'video' in part %}
                {%- if count %}{% set counted.videos = counted.videos + 1 %}{% endif %}
                {%- if add_vision_id %}{{ 'Video ' ~ counted.videos ~ ': ' }}{% endif %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- else %}
                {{- raise_exception('unknown part ' ~ part | tojson) }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- parts(messages[0].content, false) ~ '\\n\\n' }}
    {%- endif %}
    {{- '# Tools, as of ' ~ strftime_now('%d %B %Y') ~ '\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' ~ tool | tojson(indent=2) }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' ~ parts(messages[0].content, false) ~ '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if loop.first and message.role == 'system' %}{% continue %}{% endif %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' ~ parts(message.content, true) ~ '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- parts(message.content, false) }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>\\n' ~ call.function | tojson ~ '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem and loop.previtem.role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' ~ parts(message.content, false) ~ '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- eos_token ~ '\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
# One user turn, whitespace trimmed around the tags; {0} is the rendering of an image and {1} of a text.
TURN = (
    "{{% for message in messages %}}<u>{{% for part in message.content %}}{{% if part.type == 'image' %}}{0}"
    "{{% else %}}{1}{{% endif %}}{{% endfor %}}</u>{{% endfor %}}<a>"
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature without a chat template."""
    folder = Path(shutil.copytree(MINIATURE, tmp_path_factory.mktemp("prompt") / "plain"))
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.mark.torch
@pytest.mark.parametrize("template", [(MINIATURE / "chat_template.jinja").read_text(), FULL], ids=["mini", "full"])
def test_joined_parts_equal_transformers_rendering(template: str) -> None:
    from transformers import AutoTokenizer

    upstream: Any = AutoTokenizer.from_pretrained(MINIATURE)
    parts = split(template, IMAGE, special_tokens(open_checkpoint(MINIATURE)))
    for text in [*PROBES, "another one\n"]:
        for images in range(5):
            content = [{"type": "image", "image": "file.png"}] * images + [{"type": "text", "text": text}]
            rendered = upstream.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
            )
            assert parts["prefix"] + parts["image"] * images + text + parts["suffix"] == rendered


@pytest.mark.torch
def test_special_tokens_are_upstreams() -> None:
    from transformers import AutoTokenizer

    ours = special_tokens(open_checkpoint(MINIATURE))
    assert ours == dict(AutoTokenizer.from_pretrained(MINIATURE).special_tokens_map)


def test_the_miniature_is_split() -> None:
    assert split_template(open_checkpoint(MINIATURE)) == {
        "prefix": "<|im_start|>user\n",
        "image": "<|vision_start|><|image_pad|><|vision_end|>",
        "suffix": "<|im_end|>\n<|im_start|>assistant\n",
    }


def test_a_system_prompt_of_the_templates_own_is_kept() -> None:
    template = "{{ bos_token }}[system] be kind {{ 1 + 1 }}\n" + TURN.format("(<|image_pad|>)", "{{ part.text }}")
    assert split(template, IMAGE, {"bos_token": "<s>"}) == {
        "prefix": "<s>[system] be kind 2\n<u>",
        "image": "(<|image_pad|>)",
        "suffix": "</u><a>",
    }


def test_a_template_may_contain_a_probe() -> None:
    template = "Read the number. " + TURN.format("<|image_pad|>", "{{ part.text }}")
    assert split(template, IMAGE, {})["prefix"] == "Read the number. <u>"


@pytest.mark.parametrize(
    ("image", "text", "why"),
    [
        ("Image {{ loop.index }}: <|image_pad|>", "{{ part.text }}", "treats 2 images"),
        ("<|image_pad|>", "{{ part.text | trim }}", "treats 0 images and the text '  spaces around  '"),
        ("<|image_pad|>", "{{ part.text | escape }}", "&amp;"),
        ("<|image_pad|>", "{{ part.text }}{{ part.text }}", "exactly once"),
        ("<|image_pad|>", "", "exactly once"),
        ("<|image_pad|>\n", "{{ part.text }}\n<|image_pad|>", "exactly once per image"),
        ("<image>", "{{ part.text }}", "does not write <|image_pad|>"),
        ("", "{{ part.text }}", "does not write <|image_pad|>"),
        ("<|image_pad|>", "{{ raise_exception('no') }}", "TemplateError: no"),
        ("<|image_pad|>", "{{ part.text }}{{ strftime_now('%Y') }}", "today's date (%Y)"),
        ("<|image_pad|>", "{{ part.text.no.such }}", "UndefinedError"),
        ("<|image_pad|>", "{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("<|image_pad|>", "{{ messages.append(1) }}", "SecurityError"),
        ("<|image_pad|>", "{{ 1 / 0 }}", "ZeroDivisionError"),
        ("<|image_pad|>", "{% endif %}", "not a Jinja template"),
    ],
)
def test_templates_that_cannot_be_split_are_refused(image: str, text: str, why: str) -> None:
    with pytest.raises(PromptError) as caught:
        split(TURN.format(image, text), IMAGE, {})
    assert why in str(caught.value)
    assert caught.value.found is not None


def test_a_refusal_shows_both_renderings() -> None:
    with pytest.raises(PromptError) as caught:
        split(TURN.format("{{ loop.index }}<|image_pad|>", "{{ part.text }}"), IMAGE, {})
    assert caught.value.expected == repr(f"<u>1<|image_pad|>1<|image_pad|>{PROBES[0]}</u><a>")
    assert caught.value.found == repr(f"<u>1<|image_pad|>2<|image_pad|>{PROBES[0]}</u><a>")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", FULL),
        ("chat_template.json", '{"chat_template": "%s"}'),
        ("tokenizer_config.json", '{"chat_template": "%s"}'),
    ],
)
def test_the_template_is_found(file: str, content: str, plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "copy"))
    text = TURN.format("<|image_pad|>", "{{ part.text }}")
    (folder / file).write_text(content % text if "%s" in content else content, encoding="utf-8")
    prefix = "<|im_start|>user\n" if content == FULL else "<u>"
    assert split_template(open_checkpoint(folder))["prefix"] == prefix


def test_a_missing_token_is_named() -> None:
    checkpoint = open_checkpoint(MINIATURE)
    assert token_text(checkpoint, checkpoint.image_token_id) == IMAGE
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has no added token 12"):
        token_text(checkpoint, 12)
