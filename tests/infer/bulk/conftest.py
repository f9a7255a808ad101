"""The video of the processor's tests."""

from tests.processing.conftest import mp4 as mp4
from tests.processing.conftest import render as render
