"""Metrics: functions of predictions and a judge that return `Scores`.

A judge is a function of one prediction, which applies rules, such as `eval.shapes.judge`, or calls a language model.
"""

from eval.metrics.accuracy import accuracy
from eval.metrics.events import event_f1
from eval.metrics.scores import Scores

__all__ = ["Scores", "accuracy", "event_f1"]
