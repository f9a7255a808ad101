"""Clips of moving shapes: scripts, frames, descriptions, questions, and a judge that reads descriptions by grammar."""
