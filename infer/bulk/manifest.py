"""The manifest of an output: the model, the options and the versions that its captions come from."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from infer.bulk.outputs import Tally, lines_of
from tarsier_jax.errors import CheckpointError, InputError
from tarsier_jax.files import atomic_write, is_special
from tarsier_jax.mirror import destination
from tarsier_jax.versions import versions
from tarsier_jax.weights import resolve
from tarsier_jax.weights.digest import digest_weights


class Manifest:
    """The file OUTPUT.manifest.json, which is written when captioning starts and when it ends.

    {"model": {"name", "revision", "sha256"}, "options": {...}, "captions": 3, "errors": 1,
     "runs": [{"started", "ended", "command", "input", "versions", "devices"}]}

    The model and the options must stay the same in later runs into the output. "ended" is null for a run that was
    killed.

    Args:
        output: The output.
        model: Result of `identify_model`.
        options: The options that the captions depend on.
        overwrite: Whether the output is started again.

    Raises:
        InputError: the output has captions of another model or of other options, or the file is damaged.
    """

    def __init__(self, output: Path, model: Mapping[str, Any], options: Mapping[str, Any], overwrite: bool = False):
        self._path = output.with_name(output.name + ".manifest.json")
        self._is_written = not is_special(output)
        earlier = {} if overwrite or not lines_of(output).exists() else _read(self._path)
        facts = json.loads(json.dumps({"model": model, "options": options}))
        _check_same(output, earlier, facts)
        self._content = {**facts, "captions": 0, "errors": 0, "runs": list(earlier.get("runs", ()))}

    def start(self, source: str, devices: str, earlier: Tally) -> None:
        """Records the start of a run. `earlier` counts the lines of the output."""
        self._content |= {"captions": earlier.captions, "errors": earlier.errors}
        run = {"command": sys.argv, "input": source, "versions": versions(), "devices": devices}
        self._content["runs"].append({"started": _now(), "ended": None, **run})
        self._write()

    def end(self, tally: Tally) -> None:
        """Records the end of the run, and its captions and errors."""
        self._content["captions"] += tally.captions
        self._content["errors"] += tally.errors
        self._content["runs"][-1]["ended"] = _now()
        self._write()

    def _write(self) -> None:
        if not self._is_written:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self._path) as partial:
            partial.write_text(json.dumps(self._content, indent=2) + "\n", encoding="utf-8")


def identify_model(name: str) -> dict[str, Any]:
    """Returns the name of a model, its commit on the hub, and the SHA-256 of its weights.

    Raises:
        CheckpointError: see `resolve`.
    """
    directory = resolve(name)
    revision = directory.name if directory.parent.name == "snapshots" else None
    return {"name": name, "revision": revision, "sha256": digest_weights(directory).hex()}


def identify_remote_model(name: str) -> dict[str, Any]:
    """Returns `identify_model(name)`, or only the name of a model that is on other machines."""
    try:
        return identify_model(name)
    except CheckpointError:
        return {"name": name, "revision": None, "sha256": None}


def local_devices() -> str:
    """Returns number and kind of this process's devices, such as "8 x TPU v5 lite"."""
    return f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: content[key] for key in ("model", "options", "runs")}
    except FileNotFoundError:  # an output of an earlier version
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} is not the manifest of a captioning run. Choose another --output, or remove this file."
        ) from None


def _check_same(output: Path, earlier: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Raises InputError if the earlier captions come from another model or from other options."""
    if not earlier:
        return
    before, now = earlier["options"], facts["options"]
    changes = [
        f"{key} was {before.get(key)!r} and is now {now.get(key)!r}" for key in now if before.get(key) != now[key]
    ]
    old, new = earlier["model"], facts["model"]
    digests = old.get("sha256"), new["sha256"]
    if digests[0] != digests[1] if all(digests) else old.get("name") != new["name"]:
        changes.insert(0, f"the model was {_name(old)} and is now {_name(new)}")
    if changes:
        raise InputError(
            f"{destination(output)} has captions of other options: {', '.join(changes)}. Use the same options, choose "
            "another --output, or start again with --overwrite."
        )


def _name(model: Mapping[str, Any]) -> str:
    return f"{model.get('name')} (sha256 {str(model.get('sha256'))[:12]})"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
