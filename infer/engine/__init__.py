"""The engine: many prompts in, answers out as they end. `Frontend` is for callers; see `infer.engine.engine`."""

from infer.engine.config import EngineConfig, fit_config
from infer.engine.engine import Engine
from infer.engine.frontend import EngineError, Frontend, Submission
from infer.engine.requests import Completion, Request, RequestError
from infer.engine.stats import EngineStats

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EngineStats",
    "Frontend",
    "Request",
    "RequestError",
    "Submission",
    "fit_config",
]
