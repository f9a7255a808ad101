"""Benchmarks. A benchmark is one record in `BENCHMARKS`."""

from eval.benchmarks.benchmark import Benchmark
from eval.benchmarks.shapes import SHAPES, SHAPES_QA

BENCHMARKS = (SHAPES, SHAPES_QA)

__all__ = ["BENCHMARKS", "Benchmark"]
