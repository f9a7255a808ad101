"""Fine-tune the embedded model to write its descriptions as lists: `python -m examples.finetune_embedded`.

Renders clips of moving shapes with new answers, trains on them with `train.sft` on the CPU, and prints the answers for
clips that were not trained on, before and after. Needs the extra `train`. All files are written to --workdir.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import tarsier_jax
from eval.shapes.clips import HELD_OUT
from tarsier_jax.weights import EMBEDDED

TRAINED = HELD_OUT // 10 * 9  # seed of the first clip that is trained on


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.finetune_embedded",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/lists"), help="default %(default)s")
    parser.add_argument("--clips", type=int, default=400, help="to train on (default %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="default %(default)s")
    return parser.parse_args(argv)


def run(module: str, *flags: str) -> None:
    """Runs a program of the project, and exits with its status if it fails."""
    if status := subprocess.run([sys.executable, "-m", module, *flags], check=False).returncode:
        sys.exit(status)


def write_annotations(directory: Path, seed: int, clips: int) -> Path:
    """Writes clips and their annotations in the format of docs/design.md; returns the annotations."""
    run("eval.shapes", f"--output={directory}", f"--clips={clips}", f"--seed={seed}")
    path = directory / "lists.jsonl"
    with path.open("w") as file:
        for line in (directory / "descriptions.jsonl").read_text().splitlines():
            print(json.dumps(as_list(json.loads(line))), file=file)
    return path


def as_list(sample: dict) -> dict:
    """The same sample, answered by a list with one event per line."""
    user, assistant = sample["messages"]
    sentences = assistant["content"][0]["reference"].split(" Then ")
    text = "\n".join(f"- {sentence[0].upper()}{sentence[1:]}" for sentence in sentences)
    return {"messages": [user, {"role": "assistant", "content": [{"type": "text", "text": text}]}]}


def answers(model_name: str | Path, annotations: Path) -> list[str]:
    model, processor = tarsier_jax.load(model_name)
    samples = []
    for line in annotations.read_text().splitlines():
        (video, question), _ = (message["content"] for message in json.loads(line)["messages"])
        video["video"]["video_file"] = str(annotations.parent / video["video"]["video_file"])
        samples.append({"messages": [{"role": "user", "content": [video, question]}]})
    return tarsier_jax.generate(model, processor, samples, max_new_tokens=96)


def train(workdir: Path, annotations: Path, steps: int) -> Path:
    """Runs `train.sft`; returns the directory of the trained model."""
    settings = {
        "model": EMBEDDED,
        "data.train": annotations,
        "data.eval": "",
        "data.media_root": annotations.parent,
        "num_train_steps": steps,
        "optimizer.peak_lr": 3e-4,
        "optimizer.warmup_steps": steps // 10,
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    run("train.sft", "--config=configs/micro.py", f"--workdir={workdir}", *flags)
    return workdir / "model"


def main(args: argparse.Namespace) -> None:
    annotations = write_annotations(args.workdir / "train", TRAINED, args.clips)
    held_out = write_annotations(args.workdir / "eval", HELD_OUT, 4)
    before = answers(EMBEDDED, held_out)
    after = answers(train(args.workdir / "run", annotations, args.steps), held_out)
    for i, texts in enumerate(zip(before, after, strict=True)):
        print(f"\nclip {i}\n  before: {texts[0]}\n  after:  {texts[1]}")


if __name__ == "__main__":
    main(parse())
