"""Benchmarks of questions with a free answer, which a judge compares with the right one."""

from eval.benchmarks.benchmark import Benchmark
from eval.metrics import OPEN_QA

MSVD_QA = Benchmark(
    name="msvd-qa",
    dataset="MSVD-QA-val",
    metric=OPEN_QA,
    annotations="MSVD-QA-val.jsonl",
    video="MSVD/{vid}",
    subsets={"MSVD-QA-val": 6415},
)
MSR_VTT_QA = Benchmark(
    name="msr-vtt-qa",
    dataset="MSR-VTT-QA-val",
    metric=OPEN_QA,
    annotations="MSR-VTT-QA-val.jsonl",
    video="MSR-VTT/{vid}",
)
TGIF_QA = Benchmark(
    name="tgif-qa",
    dataset="TGIF-QA-test",
    metric=OPEN_QA,
    annotations="TGIF-QA-test.jsonl",
    video="TGIF/{vid}",
)
ANET_QA = Benchmark(
    name="anet-qa",
    dataset="ActivityNet-QA-test",
    metric=OPEN_QA,
    annotations="ActivityNet-QA-test.jsonl",
    video="ActivityNet/{vid}",
)
