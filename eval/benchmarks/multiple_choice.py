"""Benchmarks of multiple-choice questions. The prefill makes the model answer with a letter."""

from eval import metrics
from eval.benchmarks.benchmark import Benchmark

_PREFILL = " Answer: ("

NEXT_QA = Benchmark(
    name="next-qa",
    dataset="Next-QA-val-multi_choice",
    metric=metrics.ACCURACY,
    annotations="Next-QA-val-multi_choice.jsonl",
    video="NExT-QA/{vid}",
    prefill=_PREFILL,
    subsets={"Next-QA-val-multi_choice": 4996},
)
EGOSCHEMA = Benchmark(
    name="egoschema",
    dataset="EgoSchema",
    metric=metrics.ACCURACY,
    annotations="EgoSchema_subset.jsonl",
    video="EgoSchema/{vid}",
    prefill=_PREFILL,
    subsets={"EgoSchema": 500},
)
MVBENCH = Benchmark(
    name="mvbench",
    dataset="MVBench",
    metric=metrics.SUBTASK_ACCURACY,
    annotations="MVBench.jsonl",
    video="MVBench/{vid}",
    prefill=_PREFILL,
)
TVBENCH = Benchmark(
    name="tvbench",
    dataset="TVBench",
    metric=metrics.SUBTASK_ACCURACY,
    annotations="TVBench.jsonl",
    video="TVBench/{vid}",
    prefill=_PREFILL,
    subsets={
        **{"TVBench/Action Antonym": 320, "TVBench/Action Count": 536, "TVBench/Action Localization": 160},
        **{"TVBench/Action Sequence": 437, "TVBench/Egocentric Sequence": 200, "TVBench/Moving Direction": 232},
        **{"TVBench/Object Count": 148, "TVBench/Object Shuffle": 225, "TVBench/Scene Transition": 185},
        "TVBench/Unexpected Action": 82,
    },
)
VIDEO_MME = Benchmark(
    name="video-mme",
    dataset="Video-MME",
    metric=metrics.VIDEO_MME_ACCURACY,
    annotations="Video-MME.jsonl",
    video="Video-MME/{vid}",
    prefill=_PREFILL,
    subsets={"Video-MME": 2700},
)
FAVOR_BENCH = Benchmark(
    name="favor-bench",
    dataset="FAVOR-Bench",
    metric=metrics.SUBTASK_ACCURACY,
    annotations="FAVOR-Bench.jsonl",
    video="FAVOR-Bench/{vid}",
    prefill=_PREFILL,
)
