"""Metrics of DPO: the log-probabilities of the answers that differ."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from tarsier_jax.errors import InputError
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.processor import Processor
from tests import reference
from tests.train.packs import make_examples, make_run, pack
from train.config import TrainConfig
from train.data.packing import DataConfig
from train.data.samples import prepare_pair
from train.dpo import dpo_objective, mask_shared
from train.losses import dpo_loss
from train.mesh import global_batch
from train.optimizer import OptimizerConfig
from train.state import StepBatch, build_model


def turns(*texts: Any) -> dict[str, Any]:
    """A line of questions and answers in turn; an answer is a text, or (chosen, rejected)."""
    messages = []
    for i, text in enumerate(texts):
        pair = {"chosen": text[0], "rejected": text[1]} if isinstance(text, tuple) else {"text": text}
        messages.append({"role": "assistant" if i % 2 else "user", "content": [{"type": "text", **pair}]})
    return {"messages": messages}


SHORT = turns("What moves?", ("A red circle.", "Nothing."))
MULTI = turns(
    "What moves?", "A red circle.", "Where?", "To the left.", "And then?", ("It stops.", "It grows and stops.")
)
EARLIER = turns("What moves?", "A red circle.", "Where?", ("Left.", "Up."), "And then?", ("It stops.", "It grows."))
SUFFIX = turns("What moves?", "A red circle.", "Where?", ("To the left.", "To the left. It grows."))


def examples_of(processor: Processor, line: dict[str, Any]) -> list[Example]:
    return [processor(chat, training=True) for chat in prepare_pair(line, np.random.default_rng(0))]


def trained_text(processor: Processor, example: Example) -> str:
    return str(processor.tokenizer.decode(example.labels[example.labels >= 0]))


@pytest.mark.parametrize(
    ("line", "chosen", "rejected"),
    [
        (SHORT, "A red circle.", "Nothing."),
        (MULTI, "It stops.", "It grows and stops."),  # the common "It" counts
        (EARLIER, "Left.<|im_end|>It stops.", "Up.<|im_end|>It grows."),
        (SUFFIX, "To the left.", "To the left. It grows."),
    ],
    ids=["one answer", "equal earlier answers", "an earlier answer differs", "one begins with the other"],
)
def test_answers_count_from_the_first_that_differs(
    processor: Processor, line: dict[str, Any], chosen: str, rejected: str
) -> None:
    pair = examples_of(processor, line)
    masked = mask_shared(pair)
    assert [trained_text(processor, example) for example in masked] == [f"{chosen}<|im_end|>", f"{rejected}<|im_end|>"]
    for before, after in zip(pair, masked, strict=True):
        np.testing.assert_array_equal(after.input_ids, before.input_ids)
        assert after.labels.dtype == np.int32


def test_answers_that_are_cut_before_they_differ(processor: Processor) -> None:
    line = turns("What moves?", ("A red circle moves. It stops.", "A red circle moves. It grows."))
    short = processor.replace(max_seq_len=len(examples_of(processor, line)[0].input_ids) - 10)
    with pytest.raises(InputError, match=r'"chosen" and "rejected" are equal in the \d+ tokens within max_seq_len'):
        mask_shared(examples_of(short, line))


def test_rows_that_hold_no_pair() -> None:
    with pytest.raises(
        InputError, match=r"config\.data\.max_samples_per_seq is 1, but a row of DPO must have room for the 2 answers"
    ):
        dpo_objective(TrainConfig(data=DataConfig(max_samples_per_seq=1)))


# The loss


def conversation(example: Example, length: int, seed: int) -> Example:
    """The first `length` tokens; two answers, tokens 4 to 8 and all from 11 on, of which the last is drawn again."""
    ids, labels = example.input_ids[:length].copy(), np.full(length, -100, np.int32)
    ids[12:] = np.random.default_rng(seed).integers(1, 500, length - 12)
    labels[4:9], labels[11:] = ids[4:9], ids[11:]
    return dataclasses.replace(example, input_ids=ids, labels=labels, position_ids=example.position_ids[:, :length])


def test_shared_answers_change_rewards_but_no_gradient(tmp_path: Path) -> None:
    """The rewards are those of the last answer, as trl defines them: of all that follows the common prompt."""
    theirs = reference.make_reference(tmp_path, reference.TINY)
    spec, state = make_run(tmp_path, OptimizerConfig(warmup_steps=0))
    (whole,) = make_examples(spec.config, [[30]])
    pair = [conversation(whole, 20, seed=1), conversation(whole, 30, seed=2)]
    stored = np.array([[-70.0, -120.0]], np.float32)

    @jax.jit
    def evaluate(params: dict[str, Any], step: StepBatch) -> tuple[Any, Any]:
        def loss(params: dict[str, Any]) -> tuple[Any, Any]:
            batch, extra = jax.tree.map(lambda x: x[0], (step.batch, step.extra))
            total, _, metrics = dpo_loss(build_model(spec.graph, params, "float32"), batch, extra, beta=0.1, pairs=1)
            return total, metrics

        return jax.value_and_grad(loss, has_aux=True)(params)

    def of(pair: Sequence[Example]) -> tuple[Any, Any]:
        row = pack([pair], spec.config, reference=stored)
        return evaluate(state.params, global_batch([row], 1, spec.mesh))

    (loss, metrics), gradients = of(mask_shared(pair))
    (whole_loss, whole_metrics), whole_gradients = of(pair)
    np.testing.assert_allclose(loss, whole_loss, rtol=1e-5)
    for path, gradient in gradients.items():
        np.testing.assert_allclose(gradient, whole_gradients[path], atol=1e-5, err_msg=path)
    assert whole_metrics["log_prob_chosen"] < metrics["log_prob_chosen"] - 10  # the first answer of both

    for half, name in enumerate(("chosen", "rejected")):
        with torch.no_grad():
            logits = theirs(**reference.reference_inputs(pair[half])).logits[0]
        log_probs = torch.log_softmax(logits, dim=-1).numpy()
        ids = pair[half].input_ids
        completion = sum(log_probs[i - 1, ids[i]] for i in range(11, len(ids)))
        np.testing.assert_allclose(metrics[f"log_prob_{name}"], completion, rtol=1e-5)
        np.testing.assert_allclose(metrics[f"reward_{name}"], 0.1 * (completion - stored[0, half]), rtol=1e-4)
