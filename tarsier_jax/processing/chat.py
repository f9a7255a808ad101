"""Converts messages to token ids: chat templates, placeholder tokens of visuals, and labels."""

import contextlib
import importlib.util
import itertools
import re
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from tarsier_jax.errors import CheckpointError, InputError
from tarsier_jax.processing.image import read_json

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import AddedToken, PreTrainedTokenizerBase

# transformers caches one compiled template per process, with the state of its rendering, and whether special tokens are
# split is a state of the tokenizer.
_ENCODING = threading.Lock()

_SYSTEM = """\
{%- if messages[0].role != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
"""
# ChatML with Qwen2-VL's tokens around visuals. It trains on the text after the assistant header and on its <|im_end|>.
# `strip_final_eos` leaves the last answer open for continuation. Without `num_vision_tokens`, which only our processor
# sets, a visual is one placeholder, as in Qwen2-VL's own template. vLLM passes lists of items only to templates whose
# loop over `message.content` is not in a macro.
BARE_CHATML = """\
{%- for message in messages -%}
    {%- set content -%}
        {%- if message.content is string -%}
            {{- message.content -}}
        {%- else -%}
            {%- for item in message.content -%}
                {%- if 'text' in item -%}
                    {{- item.text -}}
                {%- else -%}
                    <|vision_start|>
                    {%- if item.num_vision_tokens is defined -%}
                        {{- '<|image_pad|>' * item.num_vision_tokens -}}
                    {%- elif item.type == 'video' or 'video' in item -%}
                        <|video_pad|>
                    {%- else -%}
                        <|image_pad|>
                    {%- endif -%}
                    <|vision_end|>
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
    {%- endset -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- set open = loop.last and strip_final_eos -%}
        {%- generation -%}
            {{- content -}}
            {%- if not open -%}{{- '<|im_end|>' -}}{%- endif -%}
        {%- endgeneration -%}
        {%- if not open -%}{{- '\\n' -}}{%- endif -%}
    {%- else -%}
        {{- content + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
CHATML = _SYSTEM + BARE_CHATML  # the default for a checkpoint without a template

# Vicuna's prompt without a system text, as in the first Tarsier: "USER: question ASSISTANT: answer</s>USER: ...". A
# prompt ends with a space. A line break follows an image or video, except before white space. A single question that
# contains "USER:" and, after it, "ASSISTANT:" is a complete prompt, which remains as it is. A message without a text is
# without a separator. As in `BARE_CHATML`, the answer and its end token are trained on, and `num_vision_tokens` counts
# placeholders. White space at the start of an answer, as in the prefill " Answer: (", replaces the space before it.
VICUNA = """\
{%- set prompt = namespace(is_complete=false) -%}
{%- for message in messages -%}
    {%- set content -%}
        {%- if message.content is string -%}
            {{- message.content -}}
        {%- else -%}
            {%- for item in message.content -%}
                {%- if 'text' not in item -%}
                    {{- '<image>' * (item.num_vision_tokens | default(1)) -}}
                {%- else -%}
                    {%- set follows_visual = loop.previtem is defined and 'text' not in loop.previtem -%}
                    {%- if follows_visual and item.text and not item.text[0].isspace() -%}{{- '\\n' -}}{%- endif -%}
                    {{- item.text -}}
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
    {%- endset -%}
    {%- if message.role == 'user' -%}
        {%- set prompt.is_complete = loop.first and messages | length <= 2 and 'USER:' in content
            and 'ASSISTANT:' in content.split('USER:', 1)[1] -%}
        {{- content if prompt.is_complete else 'USER: ' + content -}}
        {%- if not prompt.is_complete and (content or messages | length == 1) -%}{{- ' ' -}}{%- endif -%}
    {%- elif message.role == 'assistant' -%}
        {%- if not prompt.is_complete -%}
            {{- 'ASSISTANT:' + ('' if content and content[0].isspace() else ' ') -}}
        {%- endif -%}
        {%- generation -%}
            {{- content -}}
            {%- if content and not (loop.last and strip_final_eos) -%}{{- eos_token -}}{%- endif -%}
        {%- endgeneration -%}
    {%- else -%}
        {{- raise_exception('the template has no place for a system text; put it into the first question') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not prompt.is_complete -%}{{- 'ASSISTANT: ' -}}{%- endif -%}
"""

# Our template in a directory whose chat_template.jinja is for other programs (see `processing.templates`).
TEMPLATE_FILE = "tarsier_jax_chat_template.jinja"

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PRIVATE_USE = range(0xF0000, 0x10FFFE)  # characters without a meaning; a text never contains all of them


def load_tokenizer(directory: str | Path) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer of a Hugging Face directory from its own files, without config.json and remote code.

    Raises:
        CheckpointError: the tokenizer's files are missing or cannot be read.
    """
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

    directory = Path(directory)
    if (directory / "tokenizer.json").is_file():
        tokenizer_class = PreTrainedTokenizerFast
    elif (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        tokenizer_class = Qwen2Tokenizer
    elif (directory / "tokenizer.model").is_file():
        tokenizer_class = LlamaTokenizer
        _check_sentencepiece(directory)
    else:
        raise CheckpointError(
            f"{directory} has neither tokenizer.json nor tokenizer.model nor vocab.json and merges.txt. Copy the "
            "tokenizer's files from the model's repository into it."
        )
    try:
        tokenizer = tokenizer_class.from_pretrained(str(directory), local_files_only=True)
    except Exception as e:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"The tokenizer in {directory} cannot be read ({e}). Download it again.") from None
    if tokenizer_class is LlamaTokenizer:
        _set_legacy(tokenizer, directory)
    return tokenizer


def _check_sentencepiece(directory: Path) -> None:
    """Raises CheckpointError if the packages that read a tokenizer.model are missing."""
    missing = [package for package in ("sentencepiece", "google.protobuf") if not _is_installed(package)]
    if missing:
        raise CheckpointError(
            f"{directory} has a tokenizer.model and no tokenizer.json, but {' and '.join(missing)} is not installed. "
            "Run `pip install sentencepiece protobuf`, or copy a tokenizer.json into the directory."
        )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def _set_legacy(tokenizer: "PreTrainedTokenizerBase", directory: Path) -> None:
    """Makes a tokenizer of a tokenizer.model put a space before every text between special tokens if it is legacy.

    transformers 5 omits it before a text that starts with a space; transformers 4, which has written the files, does
    not. Legacy is the default, as in transformers 4.
    """
    from tokenizers import normalizers

    if (read_json(directory / "tokenizer_config.json") or {}).get("legacy", True) is not False:
        backend: Any = tokenizer.backend_tokenizer
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None


def load_chat_template(directory: str | Path) -> str:
    """Returns the first of `directory_templates`, or `CHATML` if the directory lacks templates."""
    return next(directory_templates(Path(directory)), CHATML)


def template_files(directory: Path) -> Iterator[str]:
    """Yields the templates in `TEMPLATE_FILE` and chat_template.jinja."""
    for name in (TEMPLATE_FILE, "chat_template.jinja"):
        if (directory / name).is_file():
            yield (directory / name).read_text(encoding="utf-8")


def directory_templates(directory: Path) -> Iterator[str]:
    """Yields the templates in `TEMPLATE_FILE`, chat_template.jinja, processor_config.json, chat_template.json,
    tokenizer_config.json.

    Raises:
        CheckpointError: a file has several templates, none of them named `default`.
    """
    yield from template_files(directory)
    for name in ("processor_config.json", "chat_template.json", "tokenizer_config.json"):
        if template := (read_json(directory / name) or {}).get("chat_template"):
            yield _one_template(template, directory / name)


def marks_answers(template: str) -> bool:
    """Returns whether a template marks the assistant's tokens with a {% generation %} block."""
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

    Only the template writes special tokens. A special token in a text, such as <|im_end|>, is encoded as its
    characters. An assistant message with "loss": False is without labels.

    Unless `training`, the prompt ends where the model continues: after the assistant's header, or within the last
    message if that is the assistant's. If that header ends with a space, an answer to train on is tokenized apart from
    it. Otherwise the two would share a token such as " A", which generation never produces after the space.

    Returns:
        input_ids int32 (S,), with n placeholders per visual, and labels int32 (S,): the assistant's tokens, else -100.

    Raises:
        InputError: the template rejects the messages, omits a visual, or does not mark the assistant's tokens although
            `training` or a "loss" needs them.
    """
    marked = marks_answers(template)
    if training and not marked:
        raise InputError(
            "The checkpoint's chat template does not mark the tokens to train on with a {% generation %} block. Put "
            "one around the assistant's text and its end-of-turn token, or save tarsier_jax.processing.chat.CHATML as "
            "chat_template.jinja in the checkpoint's directory."
        )
    messages, options = _final_turn(template, messages, training)
    with_spans = marked and not options.get("continue_final_message")
    escape = _Escape(tokenizer, [template, *(item["text"] for item in _items(messages) if item["type"] == "text")])
    try:
        text, spans = render_template(
            template, [_renderable(m, escape) for m in messages], with_spans, **tokenizer.special_tokens_map, **options
        )
        spans = _trained_spans(spans, messages)
        cuts = [start for start, _ in spans if training and text[:start].endswith(" ")]
        input_ids, offsets = _tokenize(tokenizer, text, escape, cuts)
    except (jinja2.TemplateError, TypeError, ValueError) as e:
        raise InputError(f"The chat template cannot render these messages: {e}. Check their roles and order.") from None
    labels = np.full(len(input_ids), -100, np.int32)
    for start, end in spans:
        inside = (offsets[:, 0] < end) & (offsets[:, 1] > start)
        labels[inside] = input_ids[inside]
    labels[np.isin(input_ids, list(placeholder_ids))] = -100  # visual tokens are input only
    counts = [item["num_vision_tokens"] for item in _items(messages) if item["type"] != "text"]
    repeats = _repeats(input_ids, counts, placeholder_ids)
    return np.repeat(input_ids, repeats), np.repeat(labels, repeats)


def render_template(
    template: str, messages: Sequence[Mapping[str, Any]], with_spans: bool = False, **variables: Any
) -> tuple[str, list[tuple[int, int]]]:
    """Renders messages as transformers does.

    Returns:
        The text and, if `with_spans`, the (start, end) of each {% generation %} block.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    options: Any = {**variables, "chat_template": template, "return_assistant_tokens_mask": with_spans}
    with _ENCODING:
        results: Any = render_jinja_template(conversations=[[dict(message) for message in messages]], **options)
    (text,), spans = results
    return text, spans[0] if with_spans else []


class _Escape:
    """Distinguishes the special tokens that a template writes from those in texts.

    In a text, the first character of each possible special token is replaced by a character that does not occur in any
    text. Lengths do not change, and all special tokens of the rendered text are the template's.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> None:
        special = [(id_, token) for id_, token in tokenizer.added_tokens_decoder.items() if token.special]
        special.sort(key=lambda entry: -len(entry[1].content))  # the tokenizer matches the longest
        self._ids = [id_ for id_, _ in special]
        self._special = re.compile("|".join(f"({_pattern(token)})" for _, token in special) or "(?!)")
        # The end of a text may be the start of a token that the next text completes.
        starts = {rf"{re.escape(t.content[0])}(?={re.escape(t.content[1:2])}|\s*\Z)" for _, t in special}
        self._starts = re.compile("|".join(sorted(starts)) or "(?!)")
        characters = set().union(*texts)
        marks = (chr(i) for i in _PRIVATE_USE if chr(i) not in characters)
        self._marks = {first: next(marks) for first in {token.content[0] for _, token in special}}
        self._unmark = {ord(mark): first for first, mark in self._marks.items()}

    def mark(self, text: str) -> str:
        """Replaces the first character of each special token in a text."""
        return self._starts.sub(lambda match: self._marks[match[0]], text)

    def split(self, text: str) -> Iterator[tuple[int, int | None, str]]:
        """Yields (offset, id, text) of each special token and, with the id None, of each text between two."""
        end = 0
        for match in self._special.finditer(text):
            if end < match.start():
                yield end, None, text[end : match.start()].translate(self._unmark)
            yield match.start(), self._ids[(match.lastindex or 1) - 1], match[0]
            end = match.end()
        if end < len(text):
            yield end, None, text[end:].translate(self._unmark)


def _pattern(token: "AddedToken") -> str:
    """Returns a regular expression for a special token and the white space that the tokenizer adds to it."""
    before, after = r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else ""
    return before + re.escape(token.content) + after


def _tokenize(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, escape: _Escape, cuts: Sequence[int] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Returns input_ids int32 (S,), and each token's (start, end) in the prompt, int32 (S, 2).

    The begin token comes first if the tokenizer adds one.

    Args:
        tokenizer: Tokenizer of the checkpoint.
        prompt: Rendered template, with marks.
        escape: Distinguishes the template's special tokens from those in texts.
        cuts: Offsets at which a new text starts, ascending.
    """
    backend: Any = tokenizer.backend_tokenizer  # avoids the threads that the tokenizer itself uses for several texts
    input_ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    with _ENCODING:
        backend.encode_special_tokens = True  # as ordinary text
        backend.no_truncation()
        backend.no_padding()
        begin = [id_ for id_ in backend.encode("").ids[:1] if id_ == tokenizer.bos_token_id]
        for start, end in itertools.pairwise((0, *cuts, len(prompt))):
            for offset, id_, text in escape.split(prompt[start:end]):
                at = start + offset
                if id_ is None:
                    # The tokenizer itself also encodes the text between two special tokens in one piece.
                    with contextlib.nullcontext() if offset == 0 else _without_prefix(backend):
                        encoding = backend.encode(text, add_special_tokens=False)
                    input_ids += encoding.ids
                    offsets += [(at + first, at + last) for first, last in encoding.offsets]
                else:
                    input_ids.append(id_)
                    offsets.append((at, at + len(text)))
    if input_ids[:1] != begin:
        input_ids, offsets = begin + input_ids, [(0, 0)] * len(begin) + offsets
    return np.array(input_ids, np.int32), np.array(offsets, np.int32).reshape(-1, 2)


@contextlib.contextmanager
def _without_prefix(backend: Any) -> Iterator[None]:
    """Encodes a text as the continuation of another one: without the space that SentencePiece adds before the first.

    Tokenizers that add the space to every text between special tokens ("legacy") still add it.
    """
    space = backend.pre_tokenizer
    if getattr(space, "prepend_scheme", None) != "first":
        yield
        return
    space.prepend_scheme = "never"
    try:
        yield
    finally:
        space.prepend_scheme = "first"


def _trained_spans(spans: list[tuple[int, int]], messages: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Returns the spans of the assistant's turns without "loss": False."""
    has_loss = [message.get("loss") is not False for message in messages if message["role"] == "assistant"]
    if all(has_loss) or not spans:
        return spans
    if len(spans) != len(has_loss):
        raise InputError(
            f'A turn has "loss": false, but the chat template has {len(spans)} {{% generation %}} blocks for '
            f"{len(has_loss)} turns of the assistant. Put one block around each, or remove the loss."
        )
    return list(itertools.compress(spans, has_loss))


def _items(messages: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    return (item for message in messages for item in message["content"])


def _one_template(template: Any, source: Path) -> str:
    """Returns the default of named templates: a dict, or in older files a list of {"name": ..., "template": ...}."""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        raise CheckpointError(f"{source} lacks a default chat template. Name one of its templates `default`.")
    return template


def _renderable(message: Mapping[str, Any], escape: _Escape) -> dict[str, Any]:
    """Returns a message for templates, of which some test the type of an item, others the key `image` or `video`."""
    content = [
        {"type": "text", "text": escape.mark(item["text"])}
        if item["type"] == "text"
        else {"type": item["type"], item["type"]: "", "num_vision_tokens": item["num_vision_tokens"]}
        for item in message["content"]
    ]
    return {"role": message["role"], "content": content}


def _final_turn(
    template: str, messages: Sequence[Mapping[str, Any]], training: bool
) -> tuple[Sequence[Mapping[str, Any]], dict[str, bool]]:
    """Returns the messages and options for the end of the prompt, also for templates without `strip_final_eos`."""
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
    """Returns the number of repetitions of each token that expands every visual to its number of placeholders.

    Tarsier's templates write all placeholders. Qwen2-VL's writes one per visual, which is repeated here.
    """
    at = np.flatnonzero(np.isin(input_ids, list(placeholder_ids)))
    repeats = np.ones(len(input_ids), np.int64)
    if len(at) == sum(counts):
        return repeats
    if len(at) != len(counts):
        raise InputError(
            f"The chat template wrote {len(at)} visual tokens for {len(counts)} images and videos of "
            f"{sum(counts)} tokens in total. Use a template that writes them."
        )
    repeats[at] = counts
    return repeats
