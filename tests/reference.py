"""The PyTorch reference: Hugging Face models with random weights, examples for them, and their answers."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from tarsier_jax.config import ModelConfig
from tarsier_jax.families import load_config
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.batch import Batch, Buckets, Example, make_batch
from tarsier_jax.processing.positions import mrope_positions
from tarsier_jax.weights import load_weights

TINY = {
    "text": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "mrope_section": (1, 2, 1),
    },
    "vision": {"depth": 2, "embed_dim": 32, "num_heads": 2},
}
# Wide enough for rounding to behave as in a real model, small enough for every run.
SMALL = {
    "text": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "mrope_section": (4, 6, 6),
    },
    "vision": {"depth": 3, "embed_dim": 128, "num_heads": 4},
}
# One layer of the decoder: reading its weights takes most of the time. TINY and SMALL have several.
TRUE_WIDTHS = {
    "text": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 1,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "mrope_section": (16, 24, 24),
    },
    "vision": {"depth": 2, "embed_dim": 1280, "num_heads": 16},
}
VOCABULARY = 512
IMAGE, VIDEO, START, END = 508, 509, 510, 511

# name -> samples of a batch; a sample is a row of text lengths and (time, height, width) grids in patches.
CASES: dict[str, list[list[Any]]] = {
    "image": [[5, (1, 8, 12), 9]],
    "video of 16 frames": [[5, (16, 6, 8), 9]],
    "two videos of different sizes": [[4, (3, 4, 10), 6, (5, 8, 4), 9]],
    "unlike samples": [[3, (2, 4, 6), 7], [40], [2, (1, 10, 4), 3, (4, 6, 4), 11]],
    "text only": [[23]],
    "500 tokens and more": [[30, (8, 12, 8), 500]],
}
BUCKETS = Buckets(patches=(64, 128), frames=(1, 4, 8, 16), tokens=(64, 128, 256, 512, 1024))


def make_reference(
    directory: Path, size: Mapping[str, Mapping[str, Any]], tied: bool = False, **over: Any
) -> Qwen2VLForConditionalGeneration:
    """A random model, also saved into `directory`. Activations are near 1, so every part affects the logits."""
    text = dict(size["text"])
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(text.pop("mrope_section"))}
    text |= {
        "vocab_size": VOCABULARY,
        "rope_parameters": rope,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rms_norm_eps": 1e-6,
    }
    config = Qwen2VLConfig(
        text_config=text,
        vision_config={**size["vision"], "hidden_size": text["hidden_size"]},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tied,
        **over,
    )
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config)
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = 1.5 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.2
            if "embed_tokens" in name and not tied:
                std = 1.0  # answers depend on the tokens, not only on their positions
            p.normal_(
                1.0 if p.ndim == 1 and "norm" in name and name.endswith("weight") else 0.0, std, generator=generator
            )
        model.tie_weights()
    keep_rope_exact(model)  # buffers, lost with the meta device
    model.save_pretrained(directory)
    return model


def keep_rope_exact(model: Qwen2VLForConditionalGeneration) -> None:
    """Recomputes the rotary frequencies in float32: they are not parameters, and a cast must not round them."""
    for module in (model.model.language_model.rotary_emb, model.model.visual.rotary_pos_emb):
        fresh = type(module)(module.config)
        module.inv_freq, module.original_inv_freq = fresh.inv_freq, fresh.original_inv_freq


def load_ours(directory: Path, **over: Any) -> Tarsier:
    """Our model with the weights that `make_reference` saved; `over` replaces fields of its configuration."""
    return load_weights(directory, dataclasses.replace(load_config(directory), **over))


def make_example(sample: Sequence[Any], config: ModelConfig, seed: int = 0) -> Example:
    """Random text and pixels in the order of `sample` (see CASES)."""
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    grids = [part for part in sample if isinstance(part, tuple)]
    for part in sample:
        if isinstance(part, tuple):
            ids += [START, *[IMAGE] * (math.prod(part) // config.vision.merge_factor), END]
        else:
            ids += rng.integers(3, 500, part).tolist()
    input_ids, grid_thw = np.array(ids, np.int32), np.array(grids, np.int32).reshape(-1, 3)
    pixels = rng.standard_normal((int(grid_thw.prod(axis=1).sum()), config.vision.patch_dim)).astype(np.float32)
    positions = mrope_positions(input_ids, grid_thw, config.vision.spatial_merge_size, (IMAGE, VIDEO))
    return Example(input_ids, input_ids, pixels, grid_thw, positions)


def make_case(name: str, config: ModelConfig) -> tuple[list[Example], Batch]:
    """The examples of a case, and the batch that they make."""
    examples = [make_example(sample, config, seed) for seed, sample in enumerate(CASES[name])]
    return examples, make_batch(examples, config, BUCKETS)


def reference_inputs(example: Example) -> dict[str, torch.Tensor | None]:
    """One example as the reference takes it: unpadded, with explicit M-RoPE ids (design decision 13)."""
    visual = {}
    if len(example.grid_thw):
        visual = {
            "pixel_values": torch.from_numpy(example.pixel_values),
            "image_grid_thw": torch.from_numpy(example.grid_thw).long(),
        }
    return {
        "input_ids": torch.from_numpy(example.input_ids).long()[None],
        "attention_mask": torch.ones(1, len(example.input_ids), dtype=torch.long),
        "position_ids": torch.from_numpy(example.position_ids).long()[:, None],
        **visual,
    }


@torch.no_grad()
def reference_logits(model: Qwen2VLForConditionalGeneration, example: Example) -> np.ndarray:
    """float32 (S, V)."""
    return model(**reference_inputs(example)).logits[0].float().numpy()


@torch.no_grad()
def reference_answer(model: Qwen2VLForConditionalGeneration, example: Example, n: int) -> list[int]:
    """The first `n` greedy tokens; generation does not end earlier."""
    out = model.generate(
        **reference_inputs(example), max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0, len(example.input_ids) :].tolist()


@torch.no_grad()
def reference_answers(model: Qwen2VLForConditionalGeneration, examples: Sequence[Example], n: int) -> list[list[int]]:
    """The first `n` greedy tokens of each example, generated in one batch whose rows are padded on the left."""
    rows, length = [reference_inputs(e) for e in examples], max(len(e.input_ids) for e in examples)
    batch = {}
    for name in ("input_ids", "attention_mask", "position_ids"):
        padded = [torch.nn.functional.pad(row[name], (length - row[name].shape[-1], 0)) for row in rows]
        batch[name] = torch.cat(padded, dim=-2)
    for name in ("pixel_values", "image_grid_thw"):
        batch[name] = torch.cat([row[name] for row in rows if name in row])
    out = model.generate(**batch, max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[:, length:].tolist()


def block_order(height: int, width: int) -> np.ndarray:
    """Row and column of each patch of a frame, int (P, 2), written as loops: 2 x 2 blocks, row by row."""
    return np.array(
        [
            (row + i, column + j)
            for row in range(0, height, 2)
            for column in range(0, width, 2)
            for i in range(2)
            for j in range(2)
        ]
    )
