"""Held-out loss and sample captions during a run."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from tarsier_jax.api import answer
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.processing.unpatch import frames_of
from train.data.annotations import mix_files, read_sample
from train.mesh import global_batch
from train.run import TrainRun
from train.state import TrainState, build_model, make_eval_step

_CAPTION_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class Caption:
    """The answer to a held-out sample.

    Attributes:
        name: Place of the sample, such as "held_out.jsonl line 3".
        text: The answer.
        frames: Frames of its images and videos, as the model receives them.
    """

    name: str
    text: str
    frames: list[Image.Image]


class Evaluation:
    """Evaluates on the annotations in config.data.eval. Raises InputError if they cannot be read."""

    def __init__(self, run: TrainRun):
        self._run, config = run, run.config
        if config.data.eval and config.eval_every:  # read at the start, as a file may be missing
            self._lines = mix_files(config.data.eval, config.seed, repeat=False)
        self._step = make_eval_step(run.spec, run.objective.loss)

    def losses(self, state: TrainState) -> dict[str, float]:
        """Returns loss and metrics of the objective over all held-out samples; names start with "eval_"."""
        mesh = self._run.spec.mesh
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        loader = self._run.rows(self._lines, rows)
        sums: dict[str, float] = {}
        for batch in loader:
            part = {k: float(v) for k, v in self._step(state, global_batch(batch, 1, mesh)).items()}
            if part["weight"] == 0:  # no samples remain; all processes see it in the same step
                break
            sums = {name: sums.get(name, 0.0) + value for name, value in part.items()}
        loader.close()
        weight = sums.pop("weight", 0.0)
        return {f"eval_{name}": value / weight for name, value in sums.items()}

    def captions(self, state: TrainState) -> list[Caption]:
        """Returns the answers to the first held-out samples, without bad ones."""
        run, config = self._run, self._run.config
        lines: Any = self._lines
        model = build_model(run.spec.graph, {**state.params, **state.frozen}, run.spec.config.dtype)
        answers = []
        for i in range(min(config.eval_captions, len(lines))):
            line = lines[i]
            try:
                sample = read_sample(line.text, config.data.media_root)
                example = run.processor(_question(run.objective.prepare(sample, np.random.default_rng(config.seed))))
            except Exception:  # as `LoadLine` does; a bad sample is counted where the loss is computed
                continue
            (generation,) = answer(model, run.processor, [example], SamplingOptions(max_new_tokens=_CAPTION_TOKENS))
            visuals = (frames_of(example, j, run.processor) for j in range(len(example.selections)))
            frames = list(itertools.chain.from_iterable(visuals))
            answers.append(Caption(f"{line.file} line {line.number}", generation.text, frames))
        return answers


def _question(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the conversation without its last answer."""
    messages = list(sample["messages"])
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return {**sample, "messages": messages}
