"""The engine: many prompts in, answers out as they end, the device always busy. See `infer.engine.engine`."""

from infer.engine.config import EngineConfig, fit_config
from infer.engine.engine import Engine
from infer.engine.requests import Completion, Request, RequestError
from infer.engine.shared import SharedEngine
from infer.engine.stats import EngineStats
from infer.engine.texts import answer_samples

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "RequestError",
    "EngineStats",
    "Request",
    "SharedEngine",
    "answer_samples",
    "fit_config",
]
