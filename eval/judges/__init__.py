"""Judges: language models behind an endpoint, with a cache of their replies, and the tasks that they answer."""

from eval.judges.flags import add_judge_flags, judge_of

__all__ = ["add_judge_flags", "judge_of"]
