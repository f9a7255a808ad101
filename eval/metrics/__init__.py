"""Metrics, each a record of functions: scores of samples, figures, tables, and the original's record files."""

from eval.metrics.autodq import AUTODQ
from eval.metrics.cider import CIDER
from eval.metrics.letters import LETTERS, LETTERS_FLAT, letters_metric
from eval.metrics.open_qa import OPEN_QA
from eval.metrics.video_mme import VIDEO_MME

__all__ = ["AUTODQ", "CIDER", "LETTERS", "LETTERS_FLAT", "OPEN_QA", "VIDEO_MME", "letters_metric"]
