"""Kept for imports of earlier versions; see `train.data.samples`."""

from train.data.samples import prepare as prepare
