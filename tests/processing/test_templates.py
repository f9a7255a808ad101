"""transformers' rendering of a directory after `save_chat_template`, for every file that it may read."""

import json
import warnings
from pathlib import Path

import jinja2
import pytest
from jinja2 import nodes
from transformers import AutoTokenizer, ProcessorMixin

from tarsier_jax.errors import InputError
from tarsier_jax.processing.chat import (
    BARE_CHATML,
    CHATML,
    TEMPLATE_FILE,
    encode_messages,
    load_chat_template,
    load_tokenizer,
    marks_answers,
)
from tarsier_jax.processing.templates import save_chat_template, training_template
from tests.processing.conftest import write_json

# Qwen2-VL's format: texts as strings or as items, one placeholder per visual.
QWEN2_VL = """\
{%- for message in messages -%}
    {%- if loop.first and message.role != 'system' -%}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
    {%- endif -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for item in message.content -%}
            {%- if item.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
            {%- elif item.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
            {%- else -%}{{ item.text }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
# Tarsier2's kind: lists of items with their numbers of tokens. The second is not ChatML.
COUNTING = """\
{%- if messages[0].role != 'system' -%}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
{%- for message in messages -%}<|im_start|>{{ message.role }}
{% for item in message.content -%}
{%- if item.type != 'text' -%}<|vision_start|>{{ '<|image_pad|>' * item.num_vision_tokens }}<|vision_end|>
{%- elif message.role == 'assistant' -%}{% generation %}{{ item.text }}{% endgeneration %}
{%- else -%}{{ item.text }}{%- endif -%}
{%- endfor -%}
{%- if not (strip_final_eos and loop.last) -%}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""
OTHER = COUNTING.replace("system\nYou are a helpful assistant.", "system\nYou see all.").replace(
    "vision_start|>", "vision_start|>+"
)


def text(words: str) -> dict:
    return {"type": "text", "text": words}


CONVERSATIONS = {
    "a string": [{"role": "user", "content": "Hello\n"}],
    "an image": [{"role": "user", "content": [{"type": "image"}, text(" What?")]}],
    "a video": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, text("What?")]}],
    "turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [text("First"), {"type": "video"}, text("then"), {"type": "image"}]},
        {"role": "assistant", "content": "A cat. "},
        {"role": "user", "content": [text("And <|video_pad|>?")]},
    ],
    "an answer": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": [text(" Answer: (")]}],
}
ONE_PAD = COUNTING.replace("item.num_vision_tokens", "(item.num_vision_tokens or 1)")
SOURCES = {
    "the hub's files": {"chat_template.json": QWEN2_VL, "tokenizer_config.json": QWEN2_VL},
    "a file": {"chat_template.jinja": QWEN2_VL},
    "no template": {},
    "Tarsier2's": {"processor_config.json": COUNTING},
    "one kind of placeholder": {"chat_template.jinja": ONE_PAD},
    "Tarsier2's in a file": {"chat_template.jinja": COUNTING, "chat_template.json": COUNTING},
}


def add_templates(directory: Path, files: dict[str, str]) -> None:
    for name, template in files.items():
        path = directory / name
        if path.suffix == ".jinja":
            path.write_text(template)
        else:
            write_json(path, {**(json.loads(path.read_text()) if path.exists() else {}), "chat_template": template})


def rendered_by_transformers(directory: Path, conversation: list[dict]) -> str:
    tokenizer = AutoTokenizer.from_pretrained(directory, use_fast=True)
    options = {"tokenize": False, "add_generation_prompt": True}
    if conversation[-1]["role"] == "assistant":
        options = {"tokenize": False, "continue_final_message": True}
    prompt = str(tokenizer.apply_chat_template(conversation, **options))
    # The processor's template is another: it may come from another file.
    template = ProcessorMixin.get_processor_dict(directory)[0]["chat_template"]
    assert tokenizer.apply_chat_template(conversation, chat_template=template, **options) == prompt
    return prompt


def expected_of(directory: Path, template: str, conversation: list[dict]) -> str:
    open_answer = conversation[-1]["role"] == "assistant"
    tokenizer = load_tokenizer(directory)
    options = {"continue_final_message": True} if open_answer else {"add_generation_prompt": True}
    return str(tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False, **options))


@pytest.fixture
def directory(checkpoint: Path) -> Path:
    write_json(checkpoint / "config.json", {"model_type": "qwen2_vl"})
    return checkpoint


@pytest.mark.parametrize("files", SOURCES.values(), ids=SOURCES)
def test_transformers_renders_exports_as_qwen2_vl(directory: Path, files: dict[str, str]) -> None:
    add_templates(directory, files)
    template = training_template(load_chat_template(directory))
    save_chat_template(directory, template)
    assert load_chat_template(directory) == template
    assert not marks_answers((directory / "chat_template.jinja").read_text())
    for conversation in CONVERSATIONS.values():
        assert rendered_by_transformers(directory, conversation) == expected_of(directory, QWEN2_VL, conversation)
    exported = {file.name: file.read_text() for file in directory.iterdir()}
    save_chat_template(directory, template)  # training again, from the export
    assert {file.name: file.read_text() for file in directory.iterdir()} == exported


def test_a_format_of_its_own(directory: Path) -> None:
    add_templates(directory, {"processor_config.json": OTHER})
    save_chat_template(directory, OTHER)
    assert load_chat_template(directory) == OTHER
    assert rendered_by_transformers(directory, CONVERSATIONS["turns"][1:]) == (
        "<|im_start|>system\nYou see all.<|im_end|>\n"
        "<|im_start|>user\nFirst<|vision_start|>+<|video_pad|><|vision_end|>then"
        "<|vision_start|>+<|image_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\nA cat. <|im_end|>\n"
        "<|im_start|>user\nAnd <|video_pad|>?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered_by_transformers(directory, CONVERSATIONS["an answer"]).endswith("assistant\n Answer: (")


def test_the_original_program_still_counts_tokens(directory: Path) -> None:
    """It reads processor_config.json."""
    for template in (COUNTING, OTHER):
        add_templates(directory, {"processor_config.json": template})
        save_chat_template(directory, template)
        ours = [{"role": "user", "content": [{"type": "video", "num_vision_tokens": 3}, text("What?")]}]
        exported = json.loads((directory / "processor_config.json").read_text())["chat_template"]
        assert exported != template
        assert expected_of(directory, exported, ours) == expected_of(directory, template, ours)
        (directory / TEMPLATE_FILE).unlink()


@pytest.mark.parametrize("template", [CHATML, BARE_CHATML])
def test_our_own_templates_serve_all(directory: Path, template: str) -> None:
    add_templates(directory, {"chat_template.jinja": template})
    save_chat_template(directory, template)
    assert not (directory / TEMPLATE_FILE).exists()
    assert rendered_by_transformers(directory, CONVERSATIONS["a video"]).endswith(
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_for_this_project_alone(directory: Path) -> None:
    odd = "{% for m in messages %}{{ m.content[0].num_vision_tokens * 2 }}{% endfor %}"
    add_templates(directory, {"chat_template.jinja": odd})
    with pytest.warns(UserWarning, match="No form of the checkpoint's chat template renders in transformers"):
        save_chat_template(directory, odd)
    assert load_chat_template(directory) == odd


@pytest.mark.parametrize("files", [{}, {"chat_template.jinja": COUNTING}, {"chat_template.jinja": OTHER}])
def test_vllm_keeps_visuals_among_the_text(directory: Path, files: dict[str, str]) -> None:
    """It passes lists of items to a template with a loop over `message.content` in a loop over `messages`."""
    add_templates(directory, files)
    save_chat_template(directory, load_chat_template(directory))
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    tree = environment.parse((directory / "chat_template.jinja").read_text())
    outer = [loop for loop in tree.find_all(nodes.For) if isinstance(loop.iter, nodes.Name)]
    iterated = [inner.iter for loop in outer for inner in loop.find_all(nodes.For)]
    assert any(isinstance(i, nodes.Getattr) and i.attr == "content" for i in iterated)


def test_templates_to_train_with() -> None:
    assert training_template(COUNTING) == COUNTING
    assert training_template(QWEN2_VL) == CHATML
    without_system = QWEN2_VL.replace("loop.first", "false")
    assert training_template(without_system) == BARE_CHATML
    with pytest.raises(InputError, match=r"does not mark .* \{% generation %\} block"):
        training_template(QWEN2_VL.replace("helpful", "careful"))


def test_labels_are_the_same_after_an_export(directory: Path) -> None:
    add_templates(directory, {"chat_template.json": QWEN2_VL})
    template = training_template(load_chat_template(directory))
    with warnings.catch_warnings(action="error"):
        save_chat_template(directory, template)
    messages = [{"role": r, "content": [text(f"The {r}")]} for r in ("user", "assistant", "user", "assistant")]
    tokenizer, loaded = load_tokenizer(directory), load_chat_template(directory)
    _, labels = encode_messages(tokenizer, loaded, messages, (), training=True)
    assert tokenizer.decode(labels[labels != -100]) == "The assistant<|im_end|>The assistant<|im_end|>"
