"""Preference pairs: which are kept, that an interrupted run resumes, and that DPO takes them."""

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import pytest

import configs.micro_dpo
from eval.judges.endpoint import Endpoint
from eval.metrics.autodq import score_descriptions
from eval.shapes import __main__ as shapes
from eval.shapes.annotations import annotation
from eval.shapes.clips import HELD_OUT, draw_clips
from eval.shapes.describe import describe
from eval.shapes.judge import RulesJudge
from infer.bulk.config import CaptionConfig
from infer.bulk.inputs import Item
from infer.engine import Completion, RequestError
from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import InputError
from tarsier_jax.families import load_config
from tarsier_jax.files import locked
from tarsier_jax.processing.perturb import PERTURBATIONS
from tarsier_jax.processing.processor import load_processor
from tests.eval.scripted import scripted_judge
from train import pairs
from train.config import TrainConfig
from train.data.annotations import read_sample
from train.data.packing import DataConfig
from train.data.samples import prepare, split_preference
from train.dpo import dpo_objective
from train.micro.checkpoint import MICRO
from train.micro.curriculum import STAGES
from train.pairs import Clip, is_preferred
from train.untrained import write_untrained

EVENTS = ["The red circle moves to the left.", "The red circle jumps.", "The blue bar grows."]
SEED, COUNT = 7, 4


def scores(text: str) -> Any:
    """Recall and precision of a description, by AutoDQ with the judge of moving shapes."""
    clip = Clip(Item(0, 0, "a.mp4", {}), {"messages": [], "extra_info": {"events": EVENTS}}, " ".join(EVENTS))
    (score,) = score_descriptions([clip.prediction(text)], RulesJudge())
    return score.values


def test_the_better_by_enough_is_preferred() -> None:
    whole, two, none = " ".join(EVENTS), " ".join(EVENTS[:2]), "The red circle grows."

    def preferred(first: str, second: str) -> bool:
        return is_preferred(scores(first), scores(second))

    assert preferred(whole, none) and preferred(whole, two)  # dR 1 and 1/3, dP 1 and 0
    assert not preferred(whole, whole) and not preferred(two, whole)
    wordy = f"{whole} The blue bar jumps."  # more precision at the cost of recall, and the other way round
    assert not preferred(two, wordy) and not preferred(wordy, two)
    assert not preferred(whole, wordy)  # dP is 1/4
    none, more, much = (
        {"recall": 0.0, "precision": 0.3},
        {"recall": 0.3, "precision": 0.3},
        {"recall": 1.0, "precision": 0.2},
    )
    assert is_preferred(more, none) and not is_preferred(much, none)  # less precision, whatever the recall


class Oracle:
    """A front-end that describes a clip correctly, and says "Nothing." of a perturbed one.

    Attributes:
        numbers: Numbers of the clips that were described, of all instances.
        interrupt_after: Number of answers after which the process is interrupted.
    """

    numbers: list[int]
    interrupt_after: int | None = None

    def __init__(self, engine: Any, workers: int, load: Callable[[tuple[Item, bool]], Any]):
        self.load = load

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def answer_all(
        self, requests: Iterable[tuple[int, tuple[Item, bool]]], _: object
    ) -> Iterator[tuple[int, Completion | RequestError]]:
        halves_apart = sorted(requests, key=lambda pair: (pair[0] // 4, pair[0] % 2))
        for num_answers, (number, request) in enumerate(halves_apart):
            if num_answers == self.interrupt_after:
                raise KeyboardInterrupt
            try:
                yield number, self.completion(number, *request)
            except InputError as error:
                yield number, RequestError(number, str(error))

    def completion(self, number: int, item: Item, is_perturbed: bool) -> Completion:
        sample = self.load((item, is_perturbed))
        disturb = sample["messages"][0]["content"][0]["video"].get("disturb")
        assert (disturb is not None and disturb["kind"] in PERTURBATIONS) == is_perturbed == number % 2
        Oracle.numbers += [number // 2]
        (clip,) = draw_clips(SEED + number // 2, 1)
        request: Any = None
        return Completion(request, "Nothing." if disturb else describe(clip.scene), [1], "eos", 0.0)


@pytest.fixture
def annotations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Annotations of moving shapes for the front-end above."""
    Oracle.numbers, Oracle.interrupt_after = [], None
    engine = SimpleNamespace(processor=lambda sample: sample)
    monkeypatch.setattr(CaptionConfig, "start", lambda _: engine)
    monkeypatch.setattr(pairs, "Frontend", Oracle)
    lines = [annotation(clip.scene, {"video_file": f"{i}.mp4"}, i) for i, clip in enumerate(draw_clips(SEED, COUNT))]
    path = tmp_path / "annotations.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make_pairs(annotations: Path, output: Path, *flags: str, judge: str = "rules") -> int:
    return pairs.main(pairs.parse(["--input", str(annotations), "--output", str(output), "--judge", judge, *flags]))


def read_pairs(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "pairs.jsonl").read_text().splitlines()]


def test_pairs_of_clean_and_perturbed_clips(annotations: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs"
    assert make_pairs(annotations, out) == 0
    lines = read_pairs(out)
    assert [line["idx"] for line in lines] == list(range(COUNT))
    for line, clip in zip(lines, draw_clips(SEED, COUNT), strict=True):
        chosen, rejected = split_preference(line)
        assert chosen["messages"][1]["content"][0]["text"] == describe(clip.scene)
        assert prepare(rejected, np.random.default_rng(0))["messages"][1]["content"][0]["text"] == "Nothing."
        assert line["messages"][0]["content"][0]["video"] == {"video_file": f"{line['idx']}.mp4"}
        assert line["autodq"] == {"chosen": {"recall": 1, "precision": 1}, "rejected": {"recall": 0, "precision": 0}}


def test_an_interrupted_run_resumes(annotations: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs"
    Oracle.interrupt_after = 5
    with pytest.raises(KeyboardInterrupt):
        make_pairs(annotations, out)
    assert not (out / "pairs.jsonl").exists()
    Oracle.interrupt_after, Oracle.numbers = None, []
    assert make_pairs(annotations, out) == 0 and set(Oracle.numbers) == {2, 3}
    Oracle.numbers = []
    assert make_pairs(annotations, out, judge="none") == 0 and Oracle.numbers == []  # other pairs, same descriptions
    assert [line["idx"] for line in read_pairs(out)] == list(range(COUNT)) and "autodq" not in read_pairs(out)[0]


def test_clips_that_fail_are_tried_again(annotations: Path, tmp_path: Path) -> None:
    lines = annotations.read_text().splitlines()
    question = json.loads(lines[1])
    question["messages"].pop()
    annotations.write_text("\n".join([lines[0], json.dumps(question), "{not json", *lines[3:]]))
    out = tmp_path / "pairs"
    for _ in range(2):
        Oracle.numbers = []
        assert make_pairs(annotations, out) == 1
    assert Oracle.numbers == [] and [line["idx"] for line in read_pairs(out)] == [0, 3]
    errors = [line["error"] for line in map(json.loads, (out / "descriptions.jsonl").open()) if "error" in line]
    assert len(errors) == 4 and any("no answer that a judge can compare with" in error for error in errors)
    assert make_pairs(annotations, out, judge="none") == 1
    assert [line["idx"] for line in read_pairs(out)] == [0, 1, 3]


def test_media_root_applies_to_the_engine_only(annotations: Path, tmp_path: Path, monkeypatch: Any) -> None:
    paths = list[str]()

    def note(sample: Any) -> Any:
        paths.append(sample["messages"][0]["content"][0]["video"]["video_file"])
        return sample

    monkeypatch.setattr(CaptionConfig, "start", lambda _: SimpleNamespace(processor=note))
    make_pairs(annotations, tmp_path / "pairs", "--media_root", "/clips", "--limit", "1")
    assert set(paths) == {"/clips/0.mp4"}
    (line,) = read_pairs(tmp_path / "pairs")
    assert line["messages"][0]["content"][0]["video"]["video_file"] == "0.mp4"


def test_other_settings_are_refused(annotations: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs"
    assert make_pairs(annotations, out, "--slots", "4") == make_pairs(annotations, out, "--slots", "8") == 0
    with pytest.raises(InputError, match=r"other settings: sampling.temperature was 0\.7 and is 0\.9\. Choose another"):
        make_pairs(annotations, out, "--temperature", "0.9")
    annotations.write_text(annotations.read_text() + annotations.read_text())
    with pytest.raises(InputError, match="other settings: input was"):
        make_pairs(annotations, out)


# Replies of a language model: recall and precision of the description of each clip, and of that of the perturbed clip.
SHARES = {0: ((1.0, 1.0), (0.5, 0.5)), 1: ((0.5, 1.0), (1.0, 0.0)), 2: ((1.0, 1.0), (1.0, 1.0))}


def replies_of(events: dict[str, Any], *faults: Any) -> list[dict[str, Any]]:
    return [*faults, {"text": json.dumps(events)}]


def judge_table() -> list[dict[str, Any]]:
    """The replies about clips whose descriptions are "clean I" and "perturbed I", and the reference "reference I".

    The first reply about a text is a fault of the server, the second one is cut short. All replies about the perturbed
    clip 3 are.
    """
    faults, names = [{"status": 429}, {"text": '{"events": ["a'}], ("clean", "perturbed", "reference")

    def extraction(text: str) -> dict[str, Any]:
        replies = faults[1:] if text == "perturbed 3" else replies_of({"events": [f"{text} a", f"{text} b"]}, *faults)
        return {"name": text, "needs": ["List its key events", text], "replies": replies}

    def entailment(text: str, source: str, share: float) -> dict[str, Any]:
        relationships = ["entailment" if i < 2 * share else "contradiction" for i in range(2)]
        events = [
            {"event": f"{source} {name}", "relationship": relationship, "reason": ""}
            for name, relationship in zip("ab", relationships, strict=True)
        ]
        needs = ["choose its relationship", text, f"{source} a"]
        return {"name": f"{text} entails {source}", "needs": needs, "replies": replies_of({"events": events})}

    rows = [extraction(f"{name} {i}") for i in range(COUNT) for name in names]
    for i in range(COUNT):
        for name, (recall, precision) in zip(names, SHARES.get(i, SHARES[0]), strict=False):
            rows.append(entailment(f"{name} {i}", f"reference {i}", recall))
            rows.append(entailment(f"reference {i}", f"{name} {i}", precision))
    return rows


class Killed(BaseException):
    pass


def test_a_language_model_as_judge(
    annotations: Path, store: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Its replies decide which pairs are kept; after a kill, no request with a reply is sent again."""

    def text_of(self: Oracle, number: int, item: Item, is_perturbed: bool) -> Completion:
        self.load((item, is_perturbed))
        Oracle.numbers += [number // 2]
        request: Any = None
        return Completion(request, f"{'Perturbed' if is_perturbed else 'Clean'} {number // 2}", [1], "eos", 0.0)

    monkeypatch.setattr(Oracle, "completion", text_of)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("eval.judges.endpoint._MAX_WAIT_S", 0.01)
    lines = [json.loads(line) for line in annotations.read_text().splitlines()]
    for i, line in enumerate(lines):
        line["messages"][-1]["content"], line["extra_info"] = [{"type": "text", "text": f"Reference {i}"}], {}
    store.pipe("/b/annotations.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines).encode())
    with scripted_judge({"rows": judge_table()}) as judge:

        def run() -> int:
            flags = ("--input", "memory://b/annotations.jsonl", "--output", "memory://b/pairs", "--judge", judge.url)
            return pairs.main(pairs.parse([*flags, "--judge_concurrency", "2", "--judge_retries", "3"]))

        send, num_sent = Endpoint._send, iter(range(15))

        def send_until_killed(self: Endpoint, messages: Any) -> Any:
            if next(num_sent, None) is None:
                raise Killed
            return send(self, messages)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Endpoint, "_send", send_until_killed)
            run()
        assert judge.table.stats()["requests"] == 15 and not store.exists("/b/pairs/pairs.jsonl")
        assert run() == 1 and set(Oracle.numbers) == set(range(COUNT)) and len(Oracle.numbers) == 2 * COUNT
        output = capsys.readouterr().out
        stats = judge.table.stats()
        num_asked = {row["name"]: row["asked"] for row in stats["rows"]}
        expected = {row["name"]: len(row["replies"]) for row in judge_table()}
        expected |= {"perturbed 3": 4, "perturbed 3 entails reference 3": 0, "reference 3 entails perturbed 3": 0}
        assert num_asked == expected and not stats["unmatched"]
        assert run() == 1 and judge.table.stats() == stats
    assert "1 pairs of 4 clips: memory://b/pairs/pairs.jsonl\n" in output
    assert "0 pairs of equal descriptions, 2 that are not better by the margin, 1 on which the judge failed" in output
    (line,) = map(json.loads, store.cat("/b/pairs/pairs.jsonl").decode().splitlines())
    answer = line["messages"][-1]["content"][0]
    assert (line["idx"], answer["chosen"], answer["rejected"]) == (0, "Clean 0", "Perturbed 0")
    scores = {"chosen": {"recall": 1, "precision": 1}, "rejected": {"recall": 0.5, "precision": 0.5}}
    assert line["autodq"] == scores


@pytest.mark.slow
def test_descriptions_are_sampled_and_dpo_reads_the_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the engine: another description of each clip, the same ones in every run."""
    monkeypatch.setattr(CaptionConfig, "start", functools.cache(CaptionConfig.start))
    shapes.main(shapes.parse(["--output", str(tmp_path / "clips"), "--clips", "2", "--seed", str(SEED), "--gif"]))
    model = write_untrained(tmp_path / "model", MICRO)
    flags = ("--model", str(model), "--media_root", str(tmp_path / "clips"), "--slots", "4", "--max_new_tokens", "16")
    flags = (*flags, "--n_frames", "4", "--top_p", "1", "--temperature", "1")
    for name in ("a", "b"):
        assert make_pairs(tmp_path / "clips" / "descriptions.jsonl", tmp_path / name, *flags, judge="none") == 0
    lines = read_pairs(tmp_path / "a")
    assert lines == read_pairs(tmp_path / "b") and len(lines) == 2
    answers = [line["messages"][-1]["content"][0] for line in lines]
    assert len({answer[key] for answer in answers for key in ("chosen", "rejected")}) == 4
    config: ModelConfig = load_config(model)
    objective = dpo_objective(TrainConfig(data=DataConfig(max_samples_per_seq=2)))
    sample = read_sample(json.dumps(lines[0]), str(tmp_path / "clips"))
    chosen, rejected = objective.load(load_processor(model, config), sample, np.random.default_rng(0)).unit
    assert chosen.frames == rejected.frames > 0 and (chosen.pixel_values == rejected.pixel_values).all()
    assert (chosen.labels >= 0).any() and (rejected.labels >= 0).any()


def test_seeds_of_micro_are_neither_trained_on_nor_held_out() -> None:
    seed = 5 * 10**8
    assert f"--seed {seed}" in (configs.micro_dpo.__doc__ or "")
    assert sum(count for count, _ in STAGES) < seed < HELD_OUT


@pytest.mark.parametrize("flags", [["--limit", "0"], ["--temperature", "-1"], ["--workers", "-1"]])
def test_bad_flags(annotations: Path, tmp_path: Path, flags: list[str]) -> None:
    with pytest.raises(InputError, match=flags[0][2:]):
        make_pairs(annotations, tmp_path / "pairs", *flags)


def test_a_second_run_into_one_directory_is_refused(annotations: Path, tmp_path: Path) -> None:
    """Before the model is loaded."""
    out = tmp_path / "pairs"
    with locked(out, inside=True), pytest.raises(InputError, match=f"Another run is writing {out}"):
        make_pairs(annotations, out, "--model", "/no/model")
