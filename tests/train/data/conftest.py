"""The videos of the processor's tests."""

from tests.processing.conftest import render as render
