"""Trains the embedded model from random weights.

    python -m train.micro --config configs/micro.py --workdir DIR [--score_clips 100]

Writes an untrained checkpoint and the seeds of moving shapes into DIR, trains as `train.sft` does, and scores the
trained model, DIR/model, on clips whose seeds training leaves out. Started again with the same flags, it resumes from
the last checkpoint.
"""

import ctypes
import dataclasses
import functools
import sys
import tempfile
from pathlib import Path

import jax
from absl import flags

import tarsier_jax
from eval.answers import Engines
from eval.benchmarks.shapes import SHAPES, SHAPES_QA
from eval.evaluation import BenchmarkInput, evaluate
from tarsier_jax.programs import run
from train.config import TrainConfig
from train.debug_data import write_debug_data
from train.loop import train
from train.main import define_run_flags, read_run
from train.micro.checkpoint import MICRO
from train.micro.curriculum import write_shapes
from train.micro.samples import prepare_line
from train.processes import write_once
from train.sft import sft_objective
from train.untrained import write_untrained
from train.workdir import open_workdir

# Parameters of glibc's mallopt, and a size above that of all arrays.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_NEVER = 2**30  # bytes


def write_inputs(config: TrainConfig, workdir: Path, is_shared: bool = True) -> TrainConfig:
    """Returns the configuration with files in the workdir where its model or its data is empty."""
    if not config.model:
        write = functools.partial(write_untrained, untrained=MICRO)
        config = dataclasses.replace(config, model=str(write_once(workdir / "untrained_model", write, is_shared)))
    if not config.data.train:
        shapes = write_once(workdir / "shapes", write_shapes, is_shared)
        files = {"train": str(shapes / "train.jsonl"), "eval": str(shapes / "held_out.jsonl")}
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, **files))
    return config


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory and reuse it.

    By default glibc maps large arrays again at each allocation, and the kernel clears their pages: a third of a small
    model's training step on two cores. One arena only, since the others consist of parts too small for such arrays.
    Must be called before the process starts threads.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # absent in musl
    if mallopt is not None:
        for parameter, value in ((_MMAP_THRESHOLD, _NEVER), (_TRIM_THRESHOLD, _NEVER), (_ARENA_MAX, 1)):
            mallopt(parameter, value)


def print_scores(model: str, clips: int) -> None:
    """Prints the scores of a checkpoint on the benchmarks of moving shapes."""
    engines = Engines(lambda: tarsier_jax.load(model))
    with tempfile.TemporaryDirectory() as output:
        for benchmark in (SHAPES, SHAPES_QA):
            source = BenchmarkInput.load(benchmark, limit=clips)
            scores = evaluate(engines, source, Path(output))
            print(scores.tables[0], flush=True)


def main() -> int:
    values = define_run_flags()
    flags.DEFINE_integer(
        "score_clips", 100, "Held-out clips that score the model; 0 for none.", lower_bound=0, flag_values=values
    )
    keep_freed_memory()
    config, path = read_run(values)
    with open_workdir(path) as (workdir, store):
        is_shared = store is None
        config = write_inputs(write_debug_data(config, workdir, is_shared), workdir, is_shared)
        summary = train(config, workdir, sft_objective(config, prepare_line), store)
        if values.score_clips and not summary.stop_signal and jax.process_index() == 0:
            print_scores(f"{store.url if store else workdir}/model", values.score_clips)
    return summary.exit_status


if __name__ == "__main__":
    sys.exit(run(main))
