"""The engine: many prompts in, answers out as they end, the device always busy. See `infer.engine.engine`."""

from infer.engine.config import EngineShape, fit_shape
from infer.engine.engine import Engine
from infer.engine.requests import Answer, Refusal, Request
from infer.engine.shared import SharedEngine
from infer.engine.stats import Report
from infer.engine.texts import answer_samples

__all__ = [
    "Answer",
    "Engine",
    "EngineShape",
    "Refusal",
    "Report",
    "Request",
    "SharedEngine",
    "answer_samples",
    "fit_shape",
]
