"""Tests run on the CPU, in float32 at the highest precision; a machine's accelerator is left alone."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches go into a temporary home."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp()))
