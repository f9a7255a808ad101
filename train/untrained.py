"""Small checkpoints with random weights in the released layouts of Tarsier2 and of the first Tarsier."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flax import nnx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tarsier_jax.families import family_of, parse_config
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.chat import BARE_CHATML
from tarsier_jax.weights import export_hf

_STD = 0.02  # of a new model's weights


@dataclasses.dataclass(frozen=True)
class Release:
    """The released files of a family, apart from sizes and weights.

    Attributes:
        special_tokens: Special tokens of the tokenizer.
        end_token: Token that ends an answer.
        pad_token: Token of padding.
        chat_template: Content of chat_template.jinja; None for the default of the family's processor.
        config_json: Entries of text_config and of vision_config, and the tokenizer -> content of config.json.
    """

    special_tokens: tuple[str, ...]
    end_token: str
    pad_token: str
    chat_template: str | None
    config_json: Callable[[Mapping[str, Any], Mapping[str, Any], Tokenizer], dict[str, Any]]


def _tarsier2_config(text: Mapping[str, Any], vision: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """A llava wrapper around two configs of type qwen2_vl."""
    ids = {name: tokenizer.token_to_id(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    ids |= {name: tokenizer.token_to_id(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    return {
        "architectures": ["TarsierForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": ids["image_pad"],
        "projection_head": None,
        "text_config": {
            "model_type": "qwen2_vl",
            **text,
            "vocab_size": _padded(tokenizer.get_vocab_size()),
            "image_token_id": ids["image_pad"],
            "video_token_id": ids["video_pad"],
            "vision_start_token_id": ids["vision_start"],
            "vision_end_token_id": ids["vision_end"],
        },
        "vision_config": {"model_type": "qwen2_vl", **vision, "hidden_size": text["hidden_size"]},
    }


def _tarsier1_config(text: Mapping[str, Any], vision: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """A llava wrapper around LLaMA and CLIP. The newline and new-image embeddings are rows without a token."""
    size = tokenizer.get_vocab_size()
    return {
        "architectures": ["TarsierForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": tokenizer.token_to_id("<image>"),
        "image_newline_idx": size,
        "image_new_idx": size + 1,
        "text_config": {"model_type": "llama", **text, "vocab_size": _padded(size + 2)},
        "vision_config": {"model_type": "clip_vision_model", **vision},
    }


def _padded(size: int) -> int:
    """Rounds a vocabulary up to a multiple of 64, which meshes divide, as in the released models."""
    return -(-size // 64) * 64


TARSIER2 = Release(
    special_tokens=(
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"),
        *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    ),
    end_token="<|im_end|>",
    pad_token="<|endoftext|>",
    chat_template=BARE_CHATML,
    config_json=_tarsier2_config,
)
TARSIER1 = Release(
    special_tokens=("<unk>", "<s>", "</s>", "<image>"),
    end_token="</s>",
    pad_token="<unk>",
    chat_template=None,
    config_json=_tarsier1_config,
)


@dataclasses.dataclass(frozen=True)
class UntrainedModel:
    """A model before training.

    Attributes:
        text: Entries of text_config in config.json.
        vision: Entries of vision_config in config.json.
        texts: Returns the texts from which the tokenizer learns its merges.
        preprocessor: Entries of preprocessor_config.json.
        initialize: Changes the random weights in place.
        release: Files of the family.
    """

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    texts: Callable[[], Iterable[str]]
    preprocessor: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    initialize: Callable[[Tarsier], None] | None = None
    release: Release = TARSIER2


def write_untrained(directory: Path, untrained: UntrainedModel, seed: int = 0) -> Path:
    """Writes config, tokenizer, chat template, preprocessor and random weights into `directory`; returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    release = untrained.release
    tokenizer = train_tokenizer(untrained.texts, release.special_tokens)
    config_json = release.config_json(untrained.text, untrained.vision, tokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": release.end_token,
        "pad_token": release.pad_token,
        "additional_special_tokens": list(release.special_tokens),
    }
    tokenizer.save(str(directory / "tokenizer.json"))
    if release.chat_template is not None:
        (directory / "chat_template.jinja").write_text(release.chat_template, encoding="utf-8")
    files = {
        "config": config_json,
        "tokenizer_config": settings,
        "preprocessor_config": dict(untrained.preprocessor),
    }
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    config = dataclasses.replace(parse_config(config_json), param_dtype="bfloat16")
    family = family_of(config)
    model = family.model(config, nnx.Rngs(seed))
    _scale(model)
    if untrained.initialize:
        untrained.initialize(model)
    export_hf(model, directory, layout=next(iter(family.layouts)))  # the released one is the first
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


@functools.cache
def train_tokenizer(texts: Callable[[], Iterable[str]], special_tokens: tuple[str, ...]) -> Tokenizer:
    """Returns a byte-level BPE tokenizer with the special tokens, trained on `texts()`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1024, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special_tokens])
    return tokenizer
