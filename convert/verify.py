"""Compares a checkpoint in this project with the Hugging Face model, or with a second checkpoint of ours.

    python -m convert.verify HF_DIR            # against transformers, in float32 on the CPU
    python -m convert.verify DIR OTHER_DIR     # ours against ours, e.g. before and after a conversion
    python -m convert.verify DIR --int8        # with weights in int8 against the same in bfloat16; or --w8a8

Prints, for an image, a video and a long text, the largest absolute differences of each tower and of the logits, the
mean KL divergence, the share of equal most likely tokens, and both greedy answers. The exit status is 1 when the greedy
answers differ, except with --int8 or --w8a8.
"""

import argparse
import sys
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

import tarsier_jax
from convert.backends import Backend, Ours, load_reference
from tarsier_jax.files import source_text
from tarsier_jax.processing.batch import Example
from tarsier_jax.programs import add_int8_flags, run
from tarsier_jax.weights import EMBEDDED, resolve
from tarsier_jax.weights.quantize import Int8

COLUMNS = ("probe", "tokens", "vision", "decoder", "logits", "mean KL", "top-1")


def probes(processor: Any) -> Iterable[tuple[str, Example]]:
    """Yields a synthetic image, a synthetic video of 16 frames, and more than 500 tokens of text."""
    rows, columns = np.mgrid[:336, :448]
    frames = [
        np.stack([rows + 4 * t, columns + 7 * t, (rows * columns) // 64 + 11 * t], axis=-1).astype(np.uint8)
        for t in range(16)
    ]
    small = [frame[:168, :224] for frame in frames]
    long_text = "Which of these comes first, and which comes last? " * 60
    contents = {
        "image": [{"type": "image", "image": {"frames": frames[:1]}}, {"type": "text", "text": "Describe the image."}],
        "video": [{"type": "video", "video": {"frames": small}}, {"type": "text", "text": "Describe the video."}],
        "text": [{"type": "text", "text": long_text}],
    }
    for name, content in contents.items():
        yield name, processor({"messages": [{"role": "user", "content": content}]})


def compare_backends(one: Backend, other: Backend, name: str, example: Example) -> tuple[str, ...]:
    """Returns one row of the table."""
    has_visuals = len(example.grid_thw) > 0
    vision = _difference(one.vision(example), other.vision(example)) if has_visuals else "-"
    decoder = _difference(one.hidden(example), other.hidden(example))
    a, b = one.logits(example), other.logits(example)
    log_p, log_q = (jax.nn.log_softmax(x, axis=-1) for x in (b, a))
    kl = float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)))
    agreement = np.mean(a.argmax(axis=-1) == b.argmax(axis=-1))
    return name, str(len(a)), vision, decoder, _difference(a, b), f"{kl:.1e}", f"{agreement:.1%}"


def _difference(a: np.ndarray, b: np.ndarray) -> str:
    return f"{np.abs(a - b).max():.1e}"


def verify(directory: str, other: str | None, dtype: str, int8: Int8, max_new_tokens: int) -> int:
    """Prints the comparison. Returns 1 if greedy answers differ, else 0."""
    model, processor = tarsier_jax.load(directory, dtype=dtype, int8=int8)
    ours = Ours(model, processor)
    other = directory if int8 and other is None else other
    if other is None:
        theirs: Backend = load_reference(resolve(directory), processor.config, processor.eos_token_ids)
    else:
        theirs = Ours(*tarsier_jax.load(other, dtype=dtype))
    weights = {False: "", True: "weights in int8, ", "w8a8": "weights and the inputs of products in int8, "}[int8]
    print(f"{directory} in this project ({weights}{dtype}) against {other or 'Hugging Face (float32)'}")
    print("largest absolute difference of: vision tower, decoder, logits\n")
    print("  ".join(f"{column:>9}" for column in COLUMNS))
    differ, answers = 0, []
    for name, example in probes(processor):
        print("  ".join(f"{cell:>9}" for cell in compare_backends(ours, theirs, name, example)), flush=True)
        a, b = (backend.answer(example, max_new_tokens) for backend in (ours, theirs))
        answers.append((name, a == b, processor.tokenizer.decode(a), processor.tokenizer.decode(b)))
        differ += a != b
    print(f"\ngreedy answers, {max_new_tokens} tokens at most")
    for name, same, a, b in answers:
        print(f"{name}: {'equal' if same else 'DIFFERENT'}\n  this: {a!r}" + ("" if same else f"\n  that: {b!r}"))
    return 1 if differ and not int8 else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m convert.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    described = f"Hugging Face directory or hub id, or a converted directory (default {EMBEDDED}, the small model here)"
    parser.add_argument("directory", type=source_text, nargs="?", default=EMBEDDED, help=described)
    parser.add_argument("other", type=source_text, nargs="?", help="a second checkpoint (default: Hugging Face)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default float32; in int8, bfloat16")
    add_int8_flags(parser)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    dtype = args.dtype or ("bfloat16" if args.int8 else "float32")
    return run(lambda: verify(args.directory, args.other, dtype, args.int8, args.max_new_tokens), args.traceback)


if __name__ == "__main__":
    sys.exit(main())
