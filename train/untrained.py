"""Small checkpoints with random weights in Tarsier2's released layout."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flax import nnx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tarsier_jax.families import parse_config
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.chat import BARE_CHATML
from tarsier_jax.weights import export_hf

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
_STD = 0.02  # of a new model's weights


@dataclasses.dataclass(frozen=True)
class UntrainedModel:
    """A model before training.

    Attributes:
        text: Entries of text_config in config.json.
        vision: Entries of vision_config in config.json.
        texts: Returns the texts from which the tokenizer learns its merges.
        preprocessor: Entries of preprocessor_config.json.
        initialize: Changes the random weights in place.
    """

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    texts: Callable[[], Iterable[str]]
    preprocessor: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    initialize: Callable[[Tarsier], None] | None = None


def write_untrained(directory: Path, untrained: UntrainedModel, seed: int = 0) -> Path:
    """Writes config, tokenizer, chat template, preprocessor and random weights into `directory`; returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(untrained.texts)
    config_json = untrained_config(untrained, tokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": list(SPECIAL_TOKENS),
    }
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(BARE_CHATML, encoding="utf-8")
    files = {
        "config": config_json,
        "tokenizer_config": settings,
        "preprocessor_config": dict(untrained.preprocessor),
    }
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    model = Tarsier(dataclasses.replace(parse_config(config_json), param_dtype="bfloat16"), nnx.Rngs(seed))
    _scale(model)
    if untrained.initialize:
        untrained.initialize(model)
    export_hf(model, directory, layout="tarsier2")
    return directory


def _scale(model: Tarsier) -> None:
    """Scales weights by fan-in, and token embeddings to unit variance, above the outputs that layers add.

    The standard deviation of 0.02 suits models a hundred times as wide; small models learn slowly from it.
    """
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if "embed" in path:
            parameter[...] /= _STD
        elif path[-1] == "weight" and parameter[...].ndim > 1 and "norm" not in str(path):
            parameter[...] /= _STD * parameter.shape[-1] ** 0.5


def untrained_config(untrained: UntrainedModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns a config.json in the released layout: a llava wrapper around two configs of type qwen2_vl."""
    ids = {name: tokenizer.token_to_id(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    ids |= {name: tokenizer.token_to_id(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    text = {
        "model_type": "qwen2_vl",
        **untrained.text,
        # A multiple of 64, which meshes divide, as in the released models.
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
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
        "vision_config": {"model_type": "qwen2_vl", **untrained.vision, "hidden_size": text["hidden_size"]},
    }


@functools.cache
def train_tokenizer(texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """Returns a byte-level BPE tokenizer with Qwen2-VL's special tokens, trained on `texts()`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1024, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer
