"""Metrics, each a record of functions: scores of samples, figures, tables, and the original's record files."""

from eval.metrics.autodq import AUTODQ
from eval.metrics.cider import CIDER
from eval.metrics.letters import ACCURACY, SUBTASK_ACCURACY, subtask_accuracy
from eval.metrics.open_qa import OPEN_QA
from eval.metrics.video_mme import VIDEO_MME_ACCURACY

__all__ = ["AUTODQ", "CIDER", "SUBTASK_ACCURACY", "ACCURACY", "OPEN_QA", "VIDEO_MME_ACCURACY", "subtask_accuracy"]
