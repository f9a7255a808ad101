"""From messages to token ids: chat templates, the tokens that stand for visuals, and labels."""

import re
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from tarsier_jax.errors import CheckpointError, InputError
from tarsier_jax.processing.image import read_json

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

_RENDERING = threading.Lock()  # transformers keeps one compiled template a process, with the state of its rendering

_SYSTEM = """\
{%- if messages[0].role != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
"""
# ChatML with Qwen2-VL's tokens around visuals. What follows the assistant header is trained on, its <|im_end|> too.
# `strip_final_eos` leaves the last answer open, to be continued.
BARE_CHATML = """\
{%- macro visual(item) -%}
    <|vision_start|>{{ '<|image_pad|>' * item.num_vision_tokens }}<|vision_end|>
{%- endmacro -%}
{%- macro render(content) -%}
    {%- for item in content -%}
        {%- if item.type == 'text' -%}{{ item.text }}{%- else -%}{{ visual(item) }}{%- endif -%}
    {%- endfor -%}
{%- endmacro -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- set open = loop.last and strip_final_eos -%}
        {%- generation -%}
            {{- render(message.content) -}}
            {%- if not open -%}{{- '<|im_end|>' -}}{%- endif -%}
        {%- endgeneration -%}
        {%- if not open -%}{{- '\\n' -}}{%- endif -%}
    {%- else -%}
        {{- render(message.content) + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
CHATML = _SYSTEM + BARE_CHATML  # used where a checkpoint brings no template

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def load_tokenizer(directory: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a Hugging Face directory, from its files alone: config.json and remote code play no part.

    Raises:
        CheckpointError: there are no tokenizer files, or they cannot be read.
    """
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    directory = Path(directory)
    if (directory / "tokenizer.json").is_file():
        tokenizer_class = PreTrainedTokenizerFast
    elif (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        tokenizer_class = Qwen2Tokenizer
    else:
        raise CheckpointError(
            f"{directory} has neither tokenizer.json nor vocab.json and merges.txt. Copy the tokenizer's files from "
            "the model's repository into it."
        )
    try:
        return tokenizer_class.from_pretrained(str(directory), local_files_only=True)
    except Exception as e:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"The tokenizer in {directory} cannot be read ({e}). Download it again.") from None


def load_chat_template(directory: str | Path, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The template of a directory, from the first of: chat_template.jinja, processor_config.json, chat_template.json,
    tokenizer_config.json. Without any, `CHATML`.
    """
    directory = Path(directory)
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("processor_config.json", "chat_template.json"):
        template = (read_json(directory / name) or {}).get("chat_template")
        if template:
            return _one_template(template, directory / name)
    if tokenizer.chat_template:
        return _one_template(tokenizer.chat_template, directory / "tokenizer_config.json")
    return CHATML


def marks_answers(template: str) -> bool:
    """Whether a template says which tokens are the assistant's, by a {% generation %} block."""
    return bool(_GENERATION.search(template))


def encode_messages(
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    messages: Sequence[Mapping[str, Any]],
    placeholder_ids: Collection[int],
    training: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Renders and tokenizes messages whose contents are lists of {"type": "text", "text": ...} and
    {"type": "image" or "video", "num_vision_tokens": n}.

    Unless `training`, the prompt ends ready for the model to go on: after the assistant's header, or within the last
    message if that is the assistant's.

    Returns:
        input_ids int32 (S,), with n placeholders per visual, and labels int32 (S,): the assistant's tokens, else -100.

    Raises:
        InputError: the template refuses the messages, does not show a visual, or does not mark the assistant's
            tokens though `training` needs them.
    """
    marked = marks_answers(template)
    if training and not marked:
        raise InputError(
            "The checkpoint's chat template has no {% generation %} block, so it does not say which tokens to train "
            "on. Put one around the assistant's text and its end-of-turn token, or save "
            "tarsier_jax.processing.chat.CHATML as chat_template.jinja in the checkpoint's directory."
        )
    options: Any
    messages, options = _final_turn(template, [_renderable(m) for m in messages], training)
    with_mask = marked and not options.get("continue_final_message")
    try:
        with _RENDERING:
            encoded: Any = tokenizer.apply_chat_template(
                messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=with_mask, **options
            )
    except (jinja2.TemplateError, TypeError, ValueError) as e:
        raise InputError(f"The chat template cannot render these messages: {e}. Check their roles and order.") from None
    input_ids = np.array(encoded["input_ids"], np.int32)
    mask = np.array(encoded["assistant_masks"], bool) if with_mask else np.zeros(len(input_ids), bool)
    labels = np.where(mask, input_ids, np.int32(-100))
    counts = [item["num_vision_tokens"] for m in messages for item in m["content"] if item["type"] != "text"]
    repeats = _repeats(input_ids, counts, placeholder_ids)
    return np.repeat(input_ids, repeats), np.repeat(labels, repeats)


def _one_template(template: Any, source: Path) -> str:
    """The default among named templates: a dict, or in older files a list of {"name": ..., "template": ...}."""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        raise CheckpointError(f"{source} has no default chat template. Name one of its templates `default`.")
    return template


def _renderable(message: Mapping[str, Any]) -> dict[str, Any]:
    """What templates look at: some test the type of an item, others for the key `image` or `video`."""
    content = [
        {"type": "text", "text": item["text"]}
        if item["type"] == "text"
        else {"type": item["type"], item["type"]: "", "num_vision_tokens": item["num_vision_tokens"]}
        for item in message["content"]
    ]
    return {"role": message["role"], "content": content}


def _final_turn(
    template: str, messages: list[dict[str, Any]], training: bool
) -> tuple[list[dict[str, Any]], dict[str, bool]]:
    """How the prompt ends. Templates that know no `strip_final_eos` get the like by other means."""
    if training:
        return messages, {"strip_final_eos": False, "add_generation_prompt": False}
    if messages[-1]["role"] != "assistant":
        return messages, {"strip_final_eos": False, "add_generation_prompt": True}
    if "strip_final_eos" in template:
        return messages, {"strip_final_eos": True, "add_generation_prompt": False}
    if any(item.get("text") for item in messages[-1]["content"]):
        return messages, {"continue_final_message": True}
    return messages[:-1], {"add_generation_prompt": True}


def _repeats(input_ids: np.ndarray, counts: Sequence[int], placeholder_ids: Collection[int]) -> np.ndarray:
    """How often to repeat each token so that every visual has its number of placeholders.

    Tarsier's templates write them all; Qwen2-VL's writes one per visual, to be repeated here.
    """
    at = np.flatnonzero(np.isin(input_ids, list(placeholder_ids)))
    repeats = np.ones(len(input_ids), np.int64)
    if len(at) == sum(counts):
        return repeats
    if len(at) != len(counts):
        raise InputError(
            f"The chat template wrote {len(at)} visual tokens for {len(counts)} images and videos of "
            f"{sum(counts)} tokens in all. Use a template that shows them, and no text that contains <|image_pad|> or "
            "<|video_pad|>."
        )
    repeats[at] = counts
    return repeats
