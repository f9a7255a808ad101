"""A small random checkpoint in Tarsier2's released layout, for trying programs without a download."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from flax import nnx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tarsier_jax.config import parse_config
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.weights import export_hf

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
WORDS = (
    "man",
    "woman",
    "dog",
    "cat",
    "ball",
    "tree",
    "room",
    "walks",
    "runs",
    "turns",
    "jumps",
    "falls",
    "red",
    "blue",
)


def random_config(vocab_size: int, image_token_id: int) -> dict[str, Any]:
    """A `config.json` in the released layout: a llava wrapper around two halves of type qwen2_vl."""
    text = {
        "model_type": "qwen2_vl",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab_size,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "image_token_id": image_token_id,
        "video_token_id": image_token_id + 1,
        "vision_start_token_id": image_token_id - 3,
        "vision_end_token_id": image_token_id - 2,
    }
    vision = {"model_type": "qwen2_vl", "depth": 2, "embed_dim": 64, "num_heads": 2, "hidden_size": 128}
    return {
        "architectures": ["TarsierForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_token_id,
        "projection_head": None,
        "text_config": text,
        "vision_config": vision,
    }


def byte_tokenizer() -> Tokenizer:
    """A byte-level vocabulary with a few words and Qwen2-VL's special tokens at its end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *("Ġ" + word for word in WORDS)]  # Ġ is how byte-level vocabularies write a space
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def write_random_checkpoint(directory: Path, seed: int = 0) -> Path:
    """Writes config, tokenizer and random weights into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": list(SPECIAL_TOKENS),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    size = tokenizer.get_vocab_size()
    raw = random_config(size, image_token_id=size - 2)  # the last but one of SPECIAL_TOKENS
    (directory / "config.json").write_text(json.dumps(raw, indent=2))
    config = dataclasses.replace(parse_config(raw), param_dtype="bfloat16")
    model = Tarsier(config, nnx.Rngs(seed))
    model.decoder.embed.weight[...] *= 50  # strong enough for one token to lead to another
    export_hf(model, directory, layout="tarsier2")
    return directory
