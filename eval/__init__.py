"""Evaluation: benchmarks, metrics, and a generated world of moving shapes."""
