"""Ours against Hugging Face (sdpa) on a CPU: prefill and decoding, side by side in one run, two threads each.

    python -m benchmarks.describe

Both have the same random weights in float32: decoder 12 x 896 (14/2 heads, mlp 2432, vocabulary 152064), ViT 8 x 320
(4 heads, with the released models' width 80), prompts with 5 frames of 12 x 22 patches. Rounds alternate between the
two, and medians are printed. The floors are the limits of this machine: the time to read every weight once per token at
the speed of a large matrix-vector product, and to compute the operations of a prompt at that of a large matrix product.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

THREADS = 2
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])  # before XLA counts its threads
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.samples import END, IMAGE, START, seconds
from tarsier_jax.config import ModelConfig
from tarsier_jax.families import load_config
from tarsier_jax.generation.decode import decode, prefill
from tarsier_jax.generation.sampling import Sampling, SamplingOptions
from tarsier_jax.models.tarsier import unstack
from tarsier_jax.processing.batch import Example, make_batch
from tarsier_jax.processing.positions import mrope_positions
from tarsier_jax.weights import load_weights

FRAMES, HEIGHT, WIDTH = 5, 12, 22
TEXT_TOKENS = 26  # tokens of the prompt around the video


TEXT = {
    "vocab_size": 152_064,
    "hidden_size": 896,
    "intermediate_size": 2432,
    "num_hidden_layers": 12,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
}
VISION = {"depth": 8, "embed_dim": 320, "num_heads": 4, "hidden_size": 896}


def make_reference(
    directory: Path, text: dict[str, Any] = TEXT, vision: dict[str, Any] = VISION, **options: Any
) -> Any:
    """Creates a random model in transformers and saves it into `directory`. `options` are fields of Qwen2VLConfig."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    options = {"tie_word_embeddings": False, **options}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **options)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).eval()
    model.save_pretrained(directory)
    return model


def make_prompt(config: ModelConfig, seed: int) -> Example:
    rng = np.random.default_rng(seed)
    grid = np.array([[FRAMES, HEIGHT, WIDTH]], np.int32)
    visual = [START, *[IMAGE] * (FRAMES * HEIGHT * WIDTH // 4), END]
    words = rng.integers(0, 150_000, TEXT_TOKENS).tolist()
    ids = np.array([*words[:14], *visual, *words[14:]], np.int32)
    pixels = rng.standard_normal((FRAMES * HEIGHT * WIDTH, config.vision.patch_dim)).astype(np.float32)
    return Example(ids, ids, pixels, grid, mrope_positions(ids, grid, 2, (IMAGE,)))


def reference_inputs(examples: list[Example]) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.from_numpy(np.stack([e.input_ids for e in examples])).long(),
        "attention_mask": torch.ones(len(examples), len(examples[0].input_ids), dtype=torch.long),
        "position_ids": torch.from_numpy(np.stack([e.position_ids for e in examples], axis=1)).long(),
        "pixel_values": torch.from_numpy(np.concatenate([e.pixel_values for e in examples])),
        "image_grid_thw": torch.from_numpy(np.concatenate([e.grid_thw for e in examples])).long(),
    }


def measure_floors() -> tuple[float, float]:
    """Returns the best bytes per second of a matrix-vector product, and the best FLOP/s of a matrix product."""
    big, vector = jnp.ones((2**15, 2**12)), jnp.ones(2**12)
    square = jnp.ones((2048, 2048))
    product = jax.jit(jnp.dot)
    read, multiply = [], []
    for _ in range(6):
        read.append(seconds(lambda: product(big, vector).block_until_ready()))
        multiply.append(seconds(lambda: product(square, square).block_until_ready()))
    return big.nbytes / min(read), 2 * 2048**3 / min(multiply)


def count_work(config: ModelConfig, rows: int, tokens: int) -> tuple[float, float]:
    """Returns the bytes that a decoding step reads (weights, cache), and the FLOPs of a prefill without attention."""
    text, vision = config.text, config.vision
    heads = (text.num_heads + 2 * text.num_kv_heads) * text.head_dim
    layers = text.num_layers * text.hidden_size * (heads + text.hidden_size + 3 * text.mlp_dim)
    head = text.vocab_size * text.hidden_size
    tower = vision.depth * vision.embed_dim * (4 * vision.embed_dim + 2 * vision.mlp_dim)
    tower += vision.patch_dim * vision.embed_dim
    width = vision.embed_dim * vision.merge_factor
    merger = (width * width + width * vision.out_dim) / vision.merge_factor
    cache = 2 * text.num_layers * text.num_kv_heads * text.head_dim * tokens * rows
    patches = FRAMES * HEIGHT * WIDTH
    return 4.0 * (layers + head + cache), 2.0 * rows * (layers * tokens + head + (tower + merger) * patches)


def measure(theirs: Any, ours: Any, rows: int, new_tokens: int, rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each prefill and of each decoded token, by name."""
    examples = [make_prompt(ours.config, seed) for seed in range(rows)]
    batch = jax.tree.map(jnp.asarray, make_batch(examples, ours.config))
    print(f"\nbatch {rows}: {len(examples[0].input_ids)} tokens padded to {batch.input_ids.shape[1]}, ", end="")
    print(f"{HEIGHT * WIDTH} patches per frame to {batch.patches.shape[2]}, frames to {batch.patches.shape[1]}")
    inputs, sampling = reference_inputs(examples), Sampling.repeat(SamplingOptions(), rows)
    keys, eos = jax.random.split(jax.random.key(0), rows), jnp.zeros(0, jnp.int32)
    state: Any = None

    def our_prefill() -> None:
        nonlocal state
        state = jax.block_until_ready(prefill(ours, batch, sampling, eos, keys, jnp.int32(128), max_new=128))

    def our_decode(n: int = new_tokens) -> None:
        nonlocal state
        state = jax.block_until_ready(decode(ours, state, eos, jnp.int32(n - 1), jnp.int32(rows)))

    def generate(n: int) -> Any:
        return theirs.generate(**inputs, max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)

    for warm_up in (our_prefill, lambda: our_decode(2), lambda: generate(2)):
        warm_up()
    times: dict[str, list[float]] = {"our prefill": [], "their prefill": [], "our decode": [], "their decode": []}
    for _ in range(rounds):
        times["our prefill"].append(seconds(our_prefill))
        times["our decode"].append(seconds(our_decode) / (new_tokens - 1))
        first = seconds(lambda: generate(1))
        times["their prefill"].append(first)
        times["their decode"].append((seconds(lambda: generate(new_tokens)) - first) / (new_tokens - 1))
    answers = generate(new_tokens)[:, len(examples[0].input_ids) :].numpy()
    agreement = (np.asarray(state.tokens)[:, :new_tokens] == answers).mean()
    print(f"  greedy tokens equal to the reference's: {agreement:.1%}")
    return times


def print_comparison(
    times: dict[str, list[float]], rows: int, floors: tuple[float, float], config: ModelConfig
) -> None:
    tokens = FRAMES * HEIGHT * WIDTH // 4 + TEXT_TOKENS + 2
    step_bytes, operations = count_work(config, rows, tokens)
    for name, floor, count in (
        ("prefill", operations / floors[1], rows * tokens),
        ("decode", step_bytes / floors[0], rows),
    ):
        ours, theirs = (statistics.median(times[f"{who} {name}"]) for who in ("our", "their"))
        print(
            f"  {name:<8} ours {ours * 1e3:8.1f} ms ({count / ours:7.1f} tokens/s)   "
            f"HF {theirs * 1e3:8.1f} ms ({count / theirs:7.1f} tokens/s)   ratio {theirs / ours:5.2f}   "
            f"floor {floor * 1e3:8.1f} ms (ours at {floor / ours:4.0%}, HF at {floor / theirs:4.0%})",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.describe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new_tokens", type=int, default=33)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(False)
    floors = measure_floors()
    print(f"this machine: reads {floors[0] / 1e9:.1f} GB/s, multiplies at {floors[1] / 1e9:.0f} GFLOP/s")
    with tempfile.TemporaryDirectory() as directory:
        theirs = make_reference(Path(directory))
        ours = unstack(load_weights(Path(directory), load_config(directory)))
    for rows in args.batch:
        print_comparison(measure(theirs, ours, rows, args.new_tokens, args.rounds), rows, floors, ours.config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
