"""Chat templates for training and for other programs."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2

from tarsier_jax.errors import InputError
from tarsier_jax.files import warn
from tarsier_jax.processing.chat import (
    BARE_CHATML,
    CHATML,
    TEMPLATE_FILE,
    directory_templates,
    marks_answers,
    render_template,
)
from tarsier_jax.processing.image import read_json

_GENERATION_TAGS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
_JSON_FILES = ("processor_config.json", "chat_template.json", "tokenizer_config.json")
Messages = list[dict[str, Any]]

# Adds the `num_vision_tokens` that a template needs to every visual of a conversation, and converts strings to items.
# Then it writes <|video_pad|> for videos.
_ADAPTER = """\
{%- set all = namespace(messages=[], pads=[]) -%}
{%- for message in messages -%}
    {%- set own = namespace(items=[]) -%}
    {%- if message.content is string -%}
        {%- set own.items = [{'type': 'text', 'text': message.content}] -%}
    {%- else -%}
        {%- for item in message.content -%}
            {%- if 'text' in item -%}
                {%- set own.items = own.items + [{'type': 'text', 'text': item.text}] -%}
            {%- else -%}
                {%- set kind = 'video' if item.type == 'video' or 'video' in item else 'image' -%}
                {%- set pad = 'image' if item.num_vision_tokens is defined else kind -%}
                {%- set count = item.num_vision_tokens | default(1) -%}
                {%- set own.items = own.items + [{'type': kind, kind: '', 'num_vision_tokens': count}] -%}
                {%- set all.pads = all.pads + ['<|' + pad + '_pad|>'] * count -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- set all.messages = all.messages + [{'role': message.role, 'content': own.items}] -%}
{%- endfor -%}
{%- set messages = all.messages -%}
{%- set text %}TEMPLATE{% endset -%}
{%- for part in text.split('<|image_pad|>') -%}
    {{- part -}}
    {%- if not loop.last -%}{{- all.pads[loop.index0] -}}{%- endif -%}
{%- endfor -%}
"""

_QUESTION = {"type": "text", "text": " Which one?\n"}
_ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "The cat"}]}
# Conversations that different templates render differently. The first visual is a video.
_PROBES = (
    [
        {"role": "user", "content": [{"type": "video"}, _QUESTION, {"type": "image"}]},
        _ANSWER,
        {"role": "user", "content": [_QUESTION]},
    ],
    [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, {"role": "user", "content": [_QUESTION]}],
    [{"role": "user", "content": [_QUESTION]}, _ANSWER],
)


def training_template(template: str) -> str:
    """Returns the template if it marks answers, else the ChatML template that renders the same text.

    Raises:
        InputError: the template does not mark answers, and ChatML renders another text.
    """
    if marks_answers(template):
        return template
    equal = _find_equal(template, (CHATML, BARE_CHATML))
    if equal is None:
        raise InputError(
            "The checkpoint's chat template does not mark the tokens to train on with a {% generation %} block. Put "
            "one around the assistant's text and its end-of-turn token."
        )
    return equal


def save_chat_template(directory: Path, template: str) -> None:
    """Writes `template` for `load_chat_template`, and an equal template for other programs.

    transformers and vLLM do not set `num_vision_tokens`. Their template renders the same conversations with one
    placeholder per visual: the first of the directory's own, `template`, `CHATML`, and `template` behind an adapter
    that does. All except the directory's own are without {% generation %} blocks, which few programs parse.
    """
    (directory / TEMPLATE_FILE).unlink(missing_ok=True)  # of an earlier export
    own, bare = list(directory_templates(directory)), _GENERATION_TAGS.sub("", template)
    adapted = _ADAPTER.replace("TEMPLATE", bare)
    standard = _find_equal(template, (*own, bare, _GENERATION_TAGS.sub("", CHATML), adapted))
    if standard is None:
        warn("No form of the checkpoint's chat template renders in transformers and vLLM. Write a chat_template.jinja.")
    else:
        _replace_templates(directory, standard)
    if template != standard:
        (directory / TEMPLATE_FILE).write_text(template, encoding="utf-8")


def _replace_templates(directory: Path, template: str) -> None:
    """Writes a template to all files that programs read, since their order differs."""
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    for name in _JSON_FILES:
        content = read_json(directory / name) or {}
        if content.get("chat_template") not in (None, template):
            text = json.dumps({**content, "chat_template": template}, indent=2, ensure_ascii=False)
            (directory / name).write_text(text + "\n", encoding="utf-8")


def _find_equal(template: str, candidates: Iterable[str]) -> str | None:
    """Returns the first candidate that renders the text of `template`, with one token per visual, or None.

    Candidates are rendered without `num_vision_tokens`.
    """
    expected = []
    for probe in _PROBES:
        if text := _render(template, _with_counts(probe)):
            # Templates that count tokens use <|image_pad|> for videos too, but other programs need <|video_pad|>.
            text = text.replace("<|video_pad|>", "<|image_pad|>").replace("<|image_pad|>", "<|video_pad|>", 1)
            expected += [(probe, text), (_with_strings(probe), text)]
    if not expected:
        return None
    return next((c for c in candidates if all(_render(c, form) == text for form, text in expected)), None)


def _render(template: str, messages: Messages) -> str | None:
    """Returns the prompt, or None if the template cannot render it."""
    try:
        return render_template(template, messages, add_generation_prompt=messages[-1]["role"] == "user")[0]
    except (jinja2.TemplateError, TypeError, ValueError):
        return None


def _with_counts(messages: Messages) -> Messages:
    def counted(item: dict[str, Any]) -> dict[str, Any]:
        return item if item["type"] == "text" else {**item, item["type"]: "", "num_vision_tokens": 1}

    return [{**message, "content": [counted(item) for item in message["content"]]} for message in messages]


def _with_strings(messages: Messages) -> Messages:
    """Returns the messages with a string in place of a single text item."""
    return [{**m, "content": m["content"][0]["text"]} if len(m["content"]) == 1 else m for m in messages]
