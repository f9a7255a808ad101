"""Judges: language models behind an endpoint, with a cache of their replies, and the tasks that they answer."""
