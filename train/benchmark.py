"""Scores of the current weights on a benchmark of `eval` during a run."""

import dataclasses
import re
import shutil

import jax

from eval.answers import Engines
from eval.benchmarks import select
from eval.evaluation import BenchmarkInput, evaluate
from tarsier_jax.errors import InputError
from tarsier_jax.models.tarsier import unstack
from train.model_export import trained_model
from train.run import TrainRun
from train.state import TrainState, model_structures


class BenchmarkEvaluation:
    """Answers and scores the samples of config.benchmark with the weights of a state.

    The engine uses the devices of the run beside the training state, and the frames and pixels of the run's processor.

    Raises:
        InputError: the benchmark is unknown, needs a judge, or lacks files; or the run has several processes.
    """

    def __init__(self, run: TrainRun):
        config = run.config.benchmark
        benchmarks = select([config.name])
        if jax.process_count() > 1 or len(benchmarks) > 1 or benchmarks[0].needs_judge:
            raise InputError(
                f"config.benchmark.name is {config.name}, but must be one benchmark without a judge, in a run of one "
                "process. Export checkpoints with train.export, and score them with eval.run."
            )
        source = BenchmarkInput.load(benchmarks[0], config.annotations or None, config.data_root or None, config.limit)
        if source.missing:
            raise InputError(
                f"{len(source.missing)} videos of config.benchmark are missing, such as {source.missing[0]}. Copy them "
                "to config.benchmark.data_root."
            )
        self._run, self._source = run, source.with_frames(run.config.processor.n_frames)
        # Unstacked layers have numbers, which recomputation would trace.
        _, graph, _ = model_structures(dataclasses.replace(run.spec.config, remat="none"), run.spec.lora)
        self._spec = dataclasses.replace(run.spec, graph=graph)

    def scores(self, state: TrainState) -> dict[str, float]:
        """Returns the figures of the benchmark, where unreadable answers are wrong; names are like "shapes_f1_score".

        WORKDIR/benchmark/predictions has the answers, which replace those of the evaluation before.
        """
        out = self._run.workdir / "benchmark"
        shutil.rmtree(out, ignore_errors=True)
        model = trained_model(self._spec, state)
        if jax.default_backend() != "tpu" and not self._run.spec.lora.rank:  # as `tarsier_jax.load` does
            model = unstack(model)
        processor = self._run.processor.replace(video_sampler="v1")  # the same frames at each evaluation
        scores = evaluate(Engines(lambda: (model, processor)), self._source, out)
        return {_metric_name(self._source.benchmark.name, name): value for name, value in scores.strict_figures.items()}


def _metric_name(benchmark: str, figure: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", f"{benchmark} {figure}".lower()).strip("_")
