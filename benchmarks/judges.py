"""Throughput of a judge behind HTTP, against the limit that the delay of its replies sets.

    python -m benchmarks.judges                      # AutoDQ of 1,000 samples, 64 requests at once, 0.5 s per reply
    python -m benchmarks.judges --faults 0.05        # one reply in 20 is an error, a hang or malformed at first

The judge is tests/eval/goldens/scripted_judge.py in its own process. The ratio is the time that the judge needs for all
requests at full concurrency, over the measured time. A hang takes the client's timeout.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from eval.judges.cache import ReplyCache
from eval.judges.endpoint import EndpointJudge, EndpointOptions
from eval.judges.prompts import DEFAULT_PROMPTS
from eval.metrics.autodq import AUTODQ
from eval.predictions import Prediction
from tarsier_jax.programs import run

SCRIPT = Path(__file__).parents[1] / "tests" / "eval" / "goldens" / "scripted_judge.py"
_RELATIONSHIPS = ("entailment", "neutral", "contradiction")


def make_predictions(count: int) -> list[Prediction]:
    """Returns descriptions with references, all different, in five subsets."""
    return [
        Prediction(
            dataset=f"DREAM/subset_{i % 5}",
            idx=i,
            prompt="Describe the video.",
            question=None,
            text=f"In take {i:05}, someone opens a door. Later two dogs run across the yard of house {i:05}.",
            references=(f"Clip {i:05} shows a woman who opens the door, and dogs that run away.",),
            extra_info={"events": [f"A woman opens door {i:05}.", f"Dogs run away in clip {i:05}."]},
            vid=str(i),
        )
        for i in range(count)
    ]


def make_table(predictions: Sequence[Prediction], faults: float, hang: float) -> dict[str, Any]:
    """Returns the replies of the scripted judge.

    Args:
        predictions: The samples.
        faults: Share of the replies that come after a fault: status 429 or 500, malformed JSON, or a hang.
        hang: Seconds of a hang.
    """
    rng, fault_rng, rows = np.random.default_rng(0), np.random.default_rng(1), []
    for prediction in predictions:
        description, reference = (prediction.text or "").lower(), prediction.reference.lower()
        events = prediction.extra_info["events"]
        extracted = [f"someone opens door {prediction.idx:05}", f"two dogs run in take {prediction.idx:05}"]
        replies = {
            "extract": ([description], {"events": extracted}),
            "recall": ([description, *events], _verdicts(events, rng)),
            "precision": ([reference, *extracted], _verdicts(extracted, rng)),
        }
        for name, (needs, reply) in replies.items():
            first = [_fault(fault_rng, hang)] if fault_rng.random() < faults else []
            rows.append(
                {"name": f"{prediction.key} {name}", "needs": needs, "replies": [*first, {"text": json.dumps(reply)}]}
            )
    return {"rows": rows}


def _verdicts(events: Sequence[str], rng: np.random.Generator) -> dict[str, Any]:
    names = rng.choice(_RELATIONSHIPS, size=len(events))
    return {"events": [{"event": e, "relationship": str(n), "reason": "r"} for e, n in zip(events, names, strict=True)]}


def _fault(rng: np.random.Generator, hang: float) -> dict[str, Any]:
    faults = ({"status": 429}, {"status": 500}, {"text": '{"events": ['}, {"text": "{}", "hang_s": hang})
    return faults[rng.integers(len(faults))]


@contextlib.contextmanager
def scripted_judge(table: dict[str, Any], delay: float, directory: Path) -> Iterator[str]:
    """Runs the scripted judge in its own process; yields its URL without /v1."""
    path = directory / "table.json"
    path.write_text(json.dumps(table), encoding="utf-8")
    command = [sys.executable, str(SCRIPT), str(path), "--delay", str(delay)]
    # The judge prints a traceback when a client has closed its connection.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def request_counts(url: str) -> dict[str, int]:
    """Returns how often each row of the scripted judge was requested."""
    with urllib.request.urlopen(f"{url}/stats") as response:
        stats = json.load(response)
    assert stats["unmatched"] == 0
    return {row["name"]: row["asked"] for row in stats["rows"]}


def main(args: argparse.Namespace) -> None:
    predictions = make_predictions(args.samples)
    table = make_table(predictions, args.faults, args.timeout + 1)
    with tempfile.TemporaryDirectory() as name, scripted_judge(table, args.delay, Path(name)) as url:
        options = EndpointOptions(f"{url}/v1", concurrency=args.concurrency, timeout=args.timeout)
        with ReplyCache(Path(name, "replies.sqlite")) as cache:
            judge = EndpointJudge(options, DEFAULT_PROMPTS, cache)
            start = time.perf_counter()
            scores = AUTODQ.score(predictions, judge)
            elapsed = time.perf_counter() - start
        num_requests = sum(request_counts(url).values())
    num_scored = sum(score.status == "scored" for score in scores)
    print(f"{num_scored} of {args.samples} samples scored: {judge.pop_usage().summary(None)}")
    num_hangs = sum("hang_s" in reply for row in table["rows"] for reply in row["replies"])
    limit = (num_requests * args.delay + num_hangs * (args.timeout - args.delay)) / args.concurrency
    print(f"{num_requests} requests in {elapsed:.1f} s; at least {limit:.1f} s: ratio {limit / elapsed:.2f}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--delay", type=float, default=0.5, help="seconds per reply")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--faults", type=float, default=0.0, help="share of replies that come after a fault")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds per request")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run(lambda: main(parse())))
