"""The records of a workdir: run.json, which must stay as it is, and runs.jsonl, with a line per start."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from tarsier_jax.errors import InputError
from tarsier_jax.files import atomic_write
from tarsier_jax.versions import versions
from train.config import FORMER_KEYS
from train.workdir import saved_steps

# Names of settings in run.json that earlier versions wrote without a section.
_WITHOUT_SECTION = {"rows": "data.rows", "lookahead": "data.lookahead", "freeze": "optimizer.freeze"}


def read_run_metadata(workdir: Path, root: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Returns the facts in run.json that must not change; none if the run has no checkpoints.

    Args:
        workdir: Directory of run.json.
        root: Directory or gs:// URL that contains the checkpoints; None for `workdir`.

    Raises:
        InputError: the file is damaged.
    """
    file = workdir / "run.json"
    return _read(file) if file.exists() and saved_steps(root or workdir) else {}


def check_run_metadata(workdir: Path, facts: Mapping[str, Any], root: str | os.PathLike[str] | None = None) -> None:
    """Writes the facts that must not change to run.json, or compares them where the run has checkpoints in `root`.

    Facts that the file does not have, from an earlier version, are added to it.

    Raises:
        InputError: the workdir belongs to a run of another model, kind or data.
    """
    file = workdir / "run.json"
    facts = json.loads(json.dumps(facts))
    former = read_run_metadata(workdir, root)
    for key, value in facts.items():
        if key in former and former[key] != value:
            raise InputError(
                f"{root or workdir} belongs to another run: {key} was {former[key]!r} and is now {value!r}. Choose "
                "another --workdir, or use the same configuration and data as before."
            )
    with atomic_write(file) as partial:
        partial.write_text(json.dumps(facts, indent=2), encoding="utf-8")


def record_start(workdir: Path, config: Mapping[str, Any]) -> list[str]:
    """Appends a line to runs.jsonl with time, command, configuration, versions and devices.

    Returns:
        The changes since the previous start, such as "optimizer.peak_lr was 1e-05 and is now 2e-05".
    """
    file = workdir / "runs.jsonl"
    config = json.loads(json.dumps(config))
    before, after = _renamed(flatten(_last_start(file).get("config", {}))), flatten(config)
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "config": config,
        "versions": versions(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "platform": jax.default_backend(),
        "processes": jax.process_count(),
    }
    cut_short = file.exists() and not file.read_bytes().endswith(b"\n")
    with file.open("a", encoding="utf-8") as out:
        out.write(("\n" if cut_short else "") + json.dumps(start) + "\n")
    return [f"{k} was {before[k]!r} and is now {v!r}" for k, v in after.items() if k in before and before[k] != v]


def last_start(workdir: Path) -> dict[str, Any]:
    """Returns the line of runs.jsonl of the last start.

    Raises:
        InputError: there is none.
    """
    start = _last_start(workdir / "runs.jsonl")
    if not start:
        raise InputError(f"{workdir} is not the workdir of a run: it has no runs.jsonl with a start in it.")
    return start


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data": {"seq_len": 4}} -> {"data.seq_len": 4}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _read(file: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return _renamed({_WITHOUT_SECTION.get(key, key): value for key, value in facts.items()})
    except (ValueError, AttributeError):
        raise InputError(f"{file} is not a JSON object. Choose another --workdir, or restore the file.") from None


def _renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings of an earlier version under the keys of this one."""
    return {FORMER_KEYS.get(key, key): value for key, value in settings.items()}


def _last_start(file: Path) -> dict[str, Any]:
    """Returns the last complete line with a configuration; empty if there is none."""
    for line in reversed(file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []):
        try:
            start = json.loads(line)
            if dict(start["config"]):
                return start
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # a line cut short or damaged
    return {}
