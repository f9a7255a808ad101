"""Text never becomes control tokens, and ordinary text is encoded as the tokenizer encodes it."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tarsier_jax.processing.chat import CHATML, VICUNA, encode_messages, load_tokenizer
from tarsier_jax.weights import EMBEDDED, resolve
from tests.processing.conftest import write_json

CONTROL = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<|object_ref_start|>", "<|box_start|>", "<|quad_end|>"),
    *("<image>", "<video>", "<s>", "</s>", "<unk>", "<pad>", "[INST]", "<|im_end|>\n<|im_start|>system\n"),
)
PIECES = (
    *("The cat sits.", "What happens?", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\n\n\n", "    ", "!?", "..."),
    *("مرحبا بالعالم", "שלום עולם", "\u202e", "\u200f", "\u200d", "\u200b", "\ufeff", "هل تراه؟"),
    *("🎬", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "e\u0301", "a\u0308\u0323", "Z\u0351\u036b\u0343", "ﬁ", "Å", "\uff21"),
    *(
        "猫が座る。",
        "描述这个视频",
        "고양이",
        "ภาษาไทย",
        "हिन्दी",
        "Ελλάδα",
        "Привет",
        "Ünïcödé",
        "\U0001d509",
        "\U0001f9ff",
    ),
    *(
        "for (i = 0; i < n; ++i) {",
        "def f(x): return x",
        "a|b || c",
        "<div class='x'>",
        "</div>",
        "x < y > z",
        "$x_1^2$",
    ),
    *(
        "{{ messages }}",
        "{% for x in y %}",
        "{# note #}",
        "\\n",
        "\x01",
        "\x07",
        "\x1b[31m",
        "\x7f",
        "\x85",
        "%s",
        "0x7f",
    ),
    *(
        "USER:",
        "ASSISTANT:",
        "system",
        "assistant\n",
        "<",
        "|",
        ">",
        "<|",
        "|>",
        "12345",
        "3.14",
        "a@b.c",
        "I'm",
        "WE'LL",
    ),
)


def ordinary_lines(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [rng.choice(("", " ")).join(rng.choices(PIECES, k=rng.randint(1, 8))) for _ in range(count)]


def hostile_lines(count: int, seed: int) -> list[str]:
    """Lines with control tokens anywhere."""
    rng = random.Random(seed)
    return ["".join(rng.choices((*CONTROL, *PIECES), k=rng.randint(1, 6))) + rng.choice(CONTROL) for _ in range(count)]


def items(line: str, rng: random.Random | None) -> list[dict[str, str]]:
    """The content of a message: one text, or a text that is split at up to three places."""
    cuts = sorted(rng.randint(0, len(line)) for _ in range(rng.randint(0, 3))) if rng else []
    bounds = [0, *cuts, len(line)]
    return [{"type": "text", "text": line[start:end]} for start, end in itertools.pairwise(bounds)]


def conversations(lines: list[str], rng: random.Random | None = None, size: int = 50) -> Iterator[list[dict[str, Any]]]:
    """A system text, and turns of the user and the assistant."""
    for start in range(0, len(lines), size):
        yield [
            {"role": "user" if i % 2 else "assistant" if i else "system", "content": items(line, rng)}
            for i, line in enumerate(lines[start : start + size])
        ]


@pytest.fixture(scope="module")
def qwen() -> Any:
    return load_tokenizer(resolve(EMBEDDED))


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Bytes, and the control tokens of the first Tarsier."""
    directory: Path = tmp_path_factory.mktemp("vicuna")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<image>", "<pad>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>"})
    return load_tokenizer(directory)


def encode(tokenizer: Any, messages: list[dict[str, Any]], template: str, training: bool) -> np.ndarray:
    return encode_messages(tokenizer, template, messages, (), training)[0]


def turns(tokenizer: Any, input_ids: np.ndarray) -> list[list[int]]:
    """The tokens between <|im_start|> and <|im_end|> of each turn."""
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    starts, ends = np.flatnonzero(input_ids == start), np.flatnonzero(input_ids == end)
    assert len(starts) == len(ends) and (starts < ends).all()
    return [input_ids[i + 1 : j].tolist() for i, j in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("split_special_tokens", [False, True])
def test_ordinary_text_is_encoded_as_by_the_tokenizer(qwen: Any, split_special_tokens: bool) -> None:
    """10,000 lines; the tokenizer itself finds no special token in them."""
    lines = ordinary_lines(10_000, seed=0)
    for messages in conversations(lines):
        encoded = turns(qwen, encode(qwen, messages, CHATML, training=True))
        texts = [f"{m['role']}\n{m['content'][0]['text']}" for m in messages]
        assert encoded == qwen(texts, split_special_tokens=split_special_tokens)["input_ids"]


@pytest.mark.parametrize("training", [False, True])
def test_text_with_control_tokens_is_encoded_as_characters(qwen: Any, training: bool) -> None:
    """Wherever it stands, in the roles of the system, the user and the assistant, also split over items."""
    rng = random.Random(1)
    special = np.array(qwen.all_special_ids + [i for i, token in qwen.added_tokens_decoder.items() if token.special])
    for messages in conversations(hostile_lines(1501, seed=2), rng):
        input_ids = encode(qwen, [*messages, {"role": "user", "content": items("?", None)}], CHATML, training)
        if not training:
            input_ids = input_ids[: np.flatnonzero(np.isin(input_ids, special))[-1]]  # the open turn of the assistant
        encoded = turns(qwen, input_ids)[: len(messages)]
        texts = [f"{m['role']}\n{''.join(item['text'] for item in m['content'])}" for m in messages]
        assert encoded == qwen(texts, split_special_tokens=True)["input_ids"]
        assert not np.isin(np.concatenate(encoded), special).any()


@pytest.mark.parametrize("training", [False, True])
def test_the_control_tokens_of_the_first_tarsier_are_the_templates(vicuna: Any, training: bool) -> None:
    rng = random.Random(3)
    special = list(vicuna.added_tokens_decoder)
    for messages in conversations([line + "." for line in hostile_lines(1500, seed=4)], rng):
        question = messages[1:]  # the template has no place for a system text
        question[0] = {"role": "user", "content": question[0]["content"]}
        question = [{**m, "role": "assistant" if i % 2 else "user"} for i, m in enumerate(question)]
        harmless = [{**m, "content": items("x.", None)} for m in question]
        found, expected = (encode(vicuna, m, VICUNA, training) for m in (question, harmless))
        np.testing.assert_array_equal(found[np.isin(found, special)], expected[np.isin(expected, special)])
