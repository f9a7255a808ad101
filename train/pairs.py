"""Preference pairs for `train.dpo`, from a model's descriptions of clips.

    python -m train.pairs --model CHECKPOINT --input ANNOTATIONS --output DIR --judge URL

The model describes every clip twice: as it is, and with perturbed frames (reversed, exchanged, cropped or discarded).
AutoDQ compares both descriptions with that of the annotation, and a pair is kept if the first one is better by a margin
in recall R and precision P: dR >= 0, dP >= 0 and dR + dP >= 0.3. With --judge none, every pair that differs is kept.
Source: Tarsier2 (arXiv 2501.07888), section 3.3, whose temperature and top_p are the defaults.

DIR/descriptions.jsonl receives a line per clip, and DIR/pairs.jsonl the pairs. The same command resumes an interrupted
run and tries failed clips again; another --judge filters the same descriptions again. The exit status is 1 if a clip
has no descriptions, or the judge failed on a pair.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.judges.flags import add_endpoint_flags, make_judge
from eval.judges.judge import Judge
from eval.judges.usage import MeteredJudge
from eval.metrics.autodq import score_descriptions
from eval.metrics.scores import SampleScore
from eval.predictions import Prediction
from eval.settings import model_digest
from infer.bulk.config import CaptionConfig, add_config_flags
from infer.bulk.inputs import Item, find_items, is_list
from infer.bulk.journal import Journal
from infer.bulk.outputs import finished_lines, write_lines
from infer.engine import Completion, Frontend, RequestError
from tarsier_jax.errors import InputError
from tarsier_jax.files import atomic_write, is_remote, locked, source_text
from tarsier_jax.mirror import destination, output_directory
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.jsonl import parse_json, to_json
from tarsier_jax.processing.perturb import PERTURBATIONS
from tarsier_jax.processing.sample import read_messages
from tarsier_jax.programs import prepare_process, run
from tarsier_jax.storage import local_copy
from tarsier_jax.weights import resolve
from train.data.annotations import with_root
from train.record import flatten

_MARGIN = 0.3
_NO_JUDGE = "none"
# Batches and shards change rounding alone: an interrupted run may continue with others.
_RUN_ONLY = {"slots", "workers", "mesh", "isolate"}


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip of the input.

    Attributes:
        item: The line or file.
        sample: The sample without its answer; its paths are those of the input.
        reference: Description in the annotation; empty if it has none.
    """

    item: Item
    sample: Mapping[str, Any]
    reference: str

    @classmethod
    def of(cls, item: Item, prompt: str) -> "Clip":
        """Raises InputError for a line that cannot be used."""
        sample = item.sample(prompt)
        messages, reference = read_messages(sample), ""
        if messages[-1]["role"] == "assistant":
            messages.pop()
            reference = _reference(sample["messages"][-1]["content"])
        videos = [part for message in messages for part in message["content"] if part["type"] == "video"]
        if len(videos) != 1:
            raise InputError(f"{item.input} has {len(videos)} videos. A preference pair needs one.")
        return cls(item, {**sample, "messages": messages}, reference)

    def perturbed(self, seed: int) -> dict[str, Any]:
        """Returns the sample with perturbed frames. The seed and the item's number determine the perturbation."""
        rng = np.random.default_rng((seed, self.item.number))
        disturb = {"kind": str(rng.choice(PERTURBATIONS)), "seed": int(rng.integers(2**31))}

        def change(part: Mapping[str, Any]) -> dict[str, Any]:
            return {**part, "video": {**part["video"], "disturb": disturb}} if part["type"] == "video" else dict(part)

        messages = [{**m, "content": [change(part) for part in m["content"]]} for m in self.sample["messages"]]
        return {**self.sample, "messages": messages}

    def prediction(self, text: str) -> Prediction:
        """Returns a description of the clip in the form in which AutoDQ scores it."""
        extra = self.sample.get("extra_info")
        return Prediction(
            dataset="pairs",
            idx=self.item.number,
            prompt="",
            question=None,
            text=text,
            references=(self.reference,),
            extra_info=extra if isinstance(extra, Mapping) else {},
            vid=self.item.input,
        )

    def pair(self, chosen: str, rejected: str) -> dict[str, Any]:
        """Returns the line of a pair."""
        answer = {"type": "text", "text": chosen, "chosen": chosen, "rejected": rejected, "reference": self.reference}
        return {**self.sample, "messages": [*self.sample["messages"], {"role": "assistant", "content": [answer]}]}


def _reference(content: Sequence[Mapping[str, Any]]) -> str:
    """Returns the expected answer of an open one (see `infer.bulk.inputs.open_answer`)."""
    references = (part.get("reference") or "" for part in content)
    return " ".join(" ".join(map(str, text)) if isinstance(text, list) else str(text) for text in references).strip()


def is_preferred(chosen: Mapping[str, float], rejected: Mapping[str, float]) -> bool:
    """Returns whether the first description is better by the margin. Arguments have the keys recall and precision."""
    more_recall, more_precision = (chosen[name] - rejected[name] for name in ("recall", "precision"))
    return min(more_recall, more_precision) >= 0 and more_recall + more_precision >= _MARGIN


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.pairs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=source_text, required=True, help="annotations (.jsonl, .parquet), or clips")
    parser.add_argument("--media_root", type=source_text, help="directory of relative paths in annotations")
    parser.add_argument("--output", type=source_text, required=True, help="directory for descriptions and pairs")
    parser.add_argument(
        "--judge",
        metavar="URL",
        required=True,
        help="endpoint with OpenAI's chat completions; or rules, for moving shapes; or none",
    )
    parser.add_argument("--limit", type=int, help="maximum number of clips")
    add_config_flags(parser, seed_help="seed of the perturbations and of the sampling")
    add_endpoint_flags(parser)
    parser.set_defaults(temperature=0.7, top_p=0.7)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit {args.limit} must be at least 1.")
    config, items = CaptionConfig.of(args), list(find_items(args.input))[: args.limit]
    judge = None if args.judge == _NO_JUDGE else make_judge(args.judge, args)
    prepare_process()
    with output_directory(args.output) as output, locked(output, inside=True):
        check_settings(output / "settings.json", run_settings(args, config))
        path = output / "descriptions.jsonl"
        num_failed = describe_missing(items, config, path, args.media_root or "", needs_reference=judge is not None)
        clips = read_descriptions(path, items, config.prompt)
        num_failed += write_pairs(clips, judge, output / "pairs.jsonl")
    return 1 if num_failed else 0


def run_settings(args: argparse.Namespace, config: CaptionConfig) -> dict[str, Any]:
    """Returns the settings that the descriptions depend on."""
    source = local_copy(args.input) if is_remote(args.input) and is_list(args.input) else Path(args.input)
    return {
        **{name: value for name, value in flatten(dataclasses.asdict(config)).items() if name not in _RUN_ONLY},
        "weights": model_digest(resolve(args.model), args.adapter),
        "input": hashlib.blake2b(source.read_bytes(), digest_size=8).hexdigest() if source.is_file() else args.input,
    }


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Stores the settings of the first run, and compares those of later ones.

    Raises:
        InputError: a setting differs.
    """
    settings = json.loads(json.dumps(settings, default=str))
    before = parse_json(path.read_text(encoding="utf-8"), str(path)) if path.exists() else settings
    differences = [f"{k} was {before.get(k)!r} and is {v!r}" for k, v in settings.items() if before.get(k) != v]
    if differences:
        raise InputError(
            f"{destination(path.parent)} contains descriptions with other settings: {'; '.join(differences)}. Choose "
            "another --output, or remove the directory."
        )
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def describe_missing(
    items: Sequence[Item], config: CaptionConfig, path: Path, media_root: str, needs_reference: bool
) -> int:
    """Appends the missing descriptions to the file `path`; returns the number of clips that failed."""
    finished = {line["idx"] for line in finished_lines(path) if "error" not in line}
    missing = [item for item in items if item.number not in finished]
    print(f"{len(items)} clips, {len(items) - len(missing)} of them described before", file=sys.stderr, flush=True)
    if not missing:
        return 0
    engine = config.start()
    with Journal(path) as journal, config.preparer(engine.processor) as prepare:

        def load(request: tuple[Item, bool]) -> Example:
            item, is_perturbed = request
            clip = Clip.of(item, config.prompt)
            if needs_reference and not clip.reference:
                raise InputError(f"{item.input} has no answer that a judge can compare with. Use --judge none.")
            sample = clip.perturbed(config.sampling.seed) if is_perturbed else dict(clip.sample)
            with journal.note(item.input):
                return prepare(with_root(sample, media_root))

        journal.try_suspects(((item.input, (item, False)) for item in missing), load)
        with Frontend(engine, config.workers, load) as frontend:
            tally = write_lines(describe(frontend, missing, config), len(missing), path)
    print(tally, file=sys.stderr, flush=True)
    return tally.errors


def describe(frontend: Frontend, items: Sequence[Item], config: CaptionConfig) -> Iterator[dict[str, Any]]:
    """Yields a line per item in the order of completion: both descriptions, or the error of one."""
    by_number = {item.number: item for item in items}
    halves: dict[int, dict[bool, Completion | RequestError]] = {}
    requests = ((2 * item.number + half, (item, bool(half))) for item in items for half in (0, 1))
    with contextlib.closing(frontend.answer_all(requests, config.sampling)) as results:  # pyright: ignore[reportArgumentType]
        for key, result in results:
            number, half = divmod(key, 2)
            answers = halves.setdefault(number, {})
            answers[bool(half)] = result
            if len(answers) == 2:
                del halves[number]
                yield _line(by_number[number], answers[False], answers[True])


def _line(item: Item, clean: Completion | RequestError, perturbed: Completion | RequestError) -> dict[str, Any]:
    source = {"idx": item.number, "input": item.input}
    for result in (clean, perturbed):
        if isinstance(result, RequestError):
            return {**source, "error": result.reason}
    assert isinstance(clean, Completion) and isinstance(perturbed, Completion)
    num_tokens = len(clean.tokens) + len(perturbed.tokens)
    return {**source, "text": clean.text, "perturbed_text": perturbed.text, "new_tokens": num_tokens}


def read_descriptions(path: Path, items: Sequence[Item], prompt: str) -> list[tuple[Clip, str, str]]:
    """Returns (clip, description, description of the perturbed clip) for each described item, in their order."""
    lines = {line["idx"]: line for line in finished_lines(path) if "error" not in line}
    described = ((item, lines[item.number]) for item in items if item.number in lines)
    return [(Clip.of(item, prompt), line["text"], line["perturbed_text"]) for item, line in described]


def write_pairs(described: Sequence[tuple[Clip, str, str]], judge: Judge | None, path: Path) -> int:
    """Writes the pairs of clips and their two descriptions; returns the number of pairs on which the judge failed."""
    pairs = [(clip, first, second) for clip, first, second in described if first.strip() != second.strip()]
    lines, num_failed = [], 0
    if judge is None:
        lines = [clip.pair(first, second) for clip, first, second in pairs]
    else:
        predictions = [clip.prediction(text) for clip, *texts in pairs for text in texts]
        scores = iter(score_descriptions(predictions, judge))
        for (clip, first, second), chosen, rejected in zip(pairs, scores, scores, strict=True):
            if not (chosen.values and rejected.values):
                num_failed += 1
            elif is_preferred(chosen.values, rejected.values):
                lines.append({**clip.pair(first, second), "autodq": _scores(chosen, rejected)})
        if isinstance(judge, MeteredJudge):
            print(f"The judge: {judge.pop_usage().summary(judge.prices)}.")
    with atomic_write(path) as partial:
        partial.write_text("".join(f"{to_json(line)}\n" for line in lines), encoding="utf-8")
    print(
        f"{len(lines)} pairs of {len(described)} clips: {destination(path)}\n{len(described) - len(pairs)} pairs of "
        f"equal descriptions, {len(pairs) - len(lines) - num_failed} that are not better by the margin, {num_failed} "
        "on which the judge failed"
    )
    return num_failed


def _scores(chosen: SampleScore, rejected: SampleScore) -> dict[str, Any]:
    return {"chosen": dict(chosen.values), "rejected": dict(rejected.values)}


if __name__ == "__main__":
    sys.exit(run(lambda: main(parse())))
