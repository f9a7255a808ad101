"""Benchmarks of descriptions."""

from eval.benchmarks.benchmark import Benchmark
from eval.metrics import AUTODQ, CIDER

DREAM = Benchmark(
    name="dream",
    dataset="DREAM",
    metric=AUTODQ,
    annotations="DREAM-1k.jsonl",
    video="DREAM/{vid}.mp4",
    prompt="Describe the video in detail.",
    # The annotations of the original's first version have other names for two of the subsets.
    subsets={
        f"DREAM/{name}": 200 for name in ("movie_animation", "movie_live_action", "vertical_video", "videvo", "youtube")
    },
)
MSVD_CAPTION = Benchmark(
    name="msvd-caption",
    dataset="MSVD-Caption-test",
    metric=CIDER,
    annotations="MSVD-Caption-test.jsonl",
    video="MSVD/{vid}",
    subsets={"MSVD-Caption-test": 670},
)
MSR_VTT_CAPTION = Benchmark(
    name="msr-vtt-caption",
    dataset="MSR-VTT-Caption-test",
    metric=CIDER,
    annotations="MSR-VTT-Caption-test.jsonl",
    video="MSR-VTT/{vid}",
)
VATEX_CAPTION = Benchmark(
    name="vatex-caption",
    dataset="VATEX-test",
    metric=CIDER,
    annotations="VATEX-test.jsonl",
    video="VATEX/{vid}",
)
