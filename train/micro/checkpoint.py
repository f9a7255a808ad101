"""New checkpoints in Tarsier2's released layout, with random weights: sizes, tokenizer, files."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from eval.shapes.annotations import GROUNDED_PROMPT, IMAGE_PROMPT, PROMPT
from eval.shapes.describe import describe, describe_frame, describe_grounded
from eval.shapes.questions import questions
from eval.shapes.script import generate
from tarsier_jax.families import parse_config
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.chat import BARE_CHATML
from tarsier_jax.weights import export_hf
from train.micro.attention_init import look, see_change

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
# Where heads look at first: see train.micro.attention_init.
_AROUND = (
    *((-1, 0, 0), (-1, 0, 1), (-1, 0, -1), (-1, 1, 0), (-1, -1, 0), (-2, 0, 0)),
    *((0, 0, -1), (0, -1, 0), (0, 0, 0)),
)
_NEIGHBOURS = ((0, 1), (1, 0), (0, -1), (-1, 0))
# Entries of the two halves of config.json and of preprocessor_config.json, and where heads look at first. Tiny is for
# trying programs; micro learns to describe moving shapes.
TINY = {
    "text": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    },
    "vision": {"depth": 2, "embed_dim": 64, "num_heads": 2},
    "preprocessor": {},
    "looking": {},
}
MICRO = {
    "text": {
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        # At the usual million, three rows and columns of tokens would look all the same; at 15, no frequency is slow
        # enough to find a word of a question at any distance. Each of time, row and column needs slow and fast ones,
        # so they take turns. (transformers 4 joins two of these lists, and counts on in the second; with nine sections
        # that starts with time again.)
        "rope_theta": 300.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [*[1] * 8, 0]},
    },
    "vision": {"depth": 2, "embed_dim": 64, "num_heads": 4},
    # Two frames a temporal patch, as Qwen2-VL has it: half as many tokens, and what changes is seen at once.
    "preprocessor": {"min_pixels": 84 * 84, "max_pixels": 84 * 112, "double_frames": False},
    "looking": {"decoder": (_AROUND, _AROUND[:6]), "vision": (_NEIGHBOURS, _NEIGHBOURS[:2])},
}
_STD = 0.02  # of a new model's weights
_SCENES = 400  # whose texts the tokenizer's merges are learnt from


def write_untrained(directory: Path, sizes: dict[str, Any], seed: int = 0) -> Path:
    """Writes config, tokenizer, chat template, preprocessor and random weights into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = shapes_tokenizer()
    raw = untrained_config(sizes, tokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": list(SPECIAL_TOKENS),
    }
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(BARE_CHATML, encoding="utf-8")
    files = {"config": raw, "tokenizer_config": settings, "preprocessor_config": sizes["preprocessor"]}
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    config = dataclasses.replace(parse_config(raw), param_dtype="bfloat16")
    model = Tarsier(config, nnx.Rngs(seed))
    _scale(model)
    if sizes["looking"]:
        look(model, **sizes["looking"])
        see_change(model)
    export_hf(model, directory, layout="tarsier2")
    return directory


def _scale(model: Tarsier) -> None:
    """Brings products to the size of what they multiply, and a token's own vector above what layers add to it.

    With the small weights that suit models a hundred times as wide, these learn slowly.
    """
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if "embed" in path:
            parameter[...] /= _STD
        elif path[-1] == "weight" and parameter[...].ndim > 1 and "norm" not in str(path):
            parameter[...] /= _STD * parameter.shape[-1] ** 0.5


def untrained_config(sizes: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """A `config.json` in the released layout: a llava wrapper around two halves of type qwen2_vl."""
    ids = {name: tokenizer.token_to_id(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    ids |= {name: tokenizer.token_to_id(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    text = {
        "model_type": "qwen2_vl",
        **sizes["text"],
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,  # which meshes divide, as in the released models
        "image_token_id": ids["image_pad"],
        "video_token_id": ids["video_pad"],
        "vision_start_token_id": ids["vision_start"],
        "vision_end_token_id": ids["vision_end"],
    }
    return {
        "architectures": ["TarsierForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": ids["image_pad"],
        "projection_head": None,
        "text_config": text,
        "vision_config": {"model_type": "qwen2_vl", **sizes["vision"], "hidden_size": text["hidden_size"]},
    }


@functools.cache
def shapes_tokenizer() -> Tokenizer:
    """A byte-level BPE to whose merges every word of the moving shapes is one token, and Qwen2-VL's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1024, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def _texts() -> Iterator[str]:
    rng = np.random.default_rng(0)
    for _ in range(_SCENES):
        scene = generate(rng)
        yield "system\nYou are a helpful assistant.user\nassistant\n Answer: ()\n"
        yield f"{PROMPT} {IMAGE_PROMPT} {GROUNDED_PROMPT}"
        yield describe(scene, rng)
        yield from (describe_frame(scene, frame) for frame in (0, scene.frames - 1))
        yield describe_grounded(scene, rng=rng)
        yield from (question.prompt() for question in questions(scene, rng))
