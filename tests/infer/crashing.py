"""`infer.caption` with an engine that says the names of clips, and a decoder that a clip's name tells to crash.

    python -m tests.infer.crashing TIMES LIST OUTPUT

Runs it so many times, each in a process of its own, and prints the exit statuses as JSON. A name with "crash" ends the
process as a fault of a native library does, and "slow" takes a while.
"""

import json
import os
import signal
import sys
import time
import warnings
from types import SimpleNamespace
from typing import Any

from infer import caption
from infer.bulk.config import CaptionConfig
from infer.engine import Completion, EngineStats, RequestError
from tarsier_jax.programs import run


class NameProcessor:
    """Returns the name of a clip in place of its prompt."""

    def __call__(self, sample: Any) -> Any:
        name = sample["messages"][0]["content"][0]["video"]["video_file"]
        if "slow" in name:
            time.sleep(0.3)
        if "crash" in name:
            time.sleep(0.1)  # meanwhile another thread starts the next clip
            signal.raise_signal(signal.SIGSEGV)
        return SimpleNamespace(frames=1, input_ids=[], name=name)

    def decode(self, tokens: list[int]) -> str:
        return ""


class NameEngine:
    """Answers with the names of the clips."""

    stats, processor, config = EngineStats(), NameProcessor(), SimpleNamespace(slots=4)

    def run(self, requests: Any) -> Any:
        for request in requests:
            is_error = isinstance(request, RequestError)
            yield request if is_error else Completion(request, request.example.name, [], "eos", 0.0)


def caption_once(source: str, output: str) -> None:
    CaptionConfig.start = lambda self: NameEngine()  # pyright: ignore[reportAttributeAccessIssue]
    args = caption.parse(["--input", source, "--output", output, "--workers", "2"])
    sys.exit(run(lambda: caption.main(args)))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)  # no thread is started before it
    statuses = []
    for _ in range(int(sys.argv[1])):
        child = os.fork()
        if not child:
            caption_once(*sys.argv[2:])
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(statuses))
