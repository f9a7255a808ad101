"""Runs in gs:// that are killed: `python -m tests.train.gcs_runs DIR`. Takes some minutes of two cores.

Two processes train in gs:// on a server on this machine, each with a cache of its own, as on two machines. Both are
killed during a save and resume, are killed again, and one process with an empty cache finishes the run. The losses and
the model agree with those of an uninterrupted run of one process in a local workdir.
"""

import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import tarsier_jax
from tarsier_jax.storage import local_copy
from tests.gcs import gcs_server
from tests.train.programs import curve, finish, free_port, start, weights

URL = "gs://bucket/run"
MESH = "--config.mesh.fsdp=4"
TOLERANCE = 1e-5  # relative, that of other runs on several processes


def start_two(directory: Path) -> list[Any]:
    flags = (MESH, f"--coordinator=localhost:{free_port()}", "--num_processes=2")
    caches = [{"XDG_CACHE_HOME": str(directory / f"cache_{i}")} for i in range(2)]
    return [start(URL, *flags, f"--process_id={i}", devices=2, environment=caches[i]) for i in range(2)]


def kill_during_save(processes: list[Any], store: Any, first: int) -> None:
    """Kills the processes when the store has the first object of a checkpoint from step `first` on."""
    while not any(step >= first for step in steps_of(store)):
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2, outputs
    print(f"killed: the store has objects of the steps {sorted(steps_of(store))}")
    print(outputs[0])


def steps_of(store: Any) -> set[int]:
    names = (name.partition("/checkpoints/")[2] for name in store.find("bucket/run"))
    return {int(name.split("/")[0]) for name in names if name}


def main() -> None:
    directory = Path(sys.argv[1])
    finish(start(directory / "local", MESH, devices=4))
    with gcs_server() as store:
        kill_during_save(start_two(directory), store, 6)
        kill_during_save(start_two(directory), store, 12)
        printed = finish(start(URL, MESH, devices=4, environment={"XDG_CACHE_HOME": str(directory / "empty")}))
        print(printed)
        assert "resumed from step" in printed
        names = [name.removeprefix("bucket/run/") for name in store.find("bucket/run")]
        print(*(name for name in names if "/params/" not in name and not name.startswith("checkpoints/")), sep="\n")
        copy = directory / "copy"
        copy.mkdir()
        (copy / "metrics.jsonl").write_bytes(store.cat_file("bucket/run/metrics.jsonl"))
        losses, expected = curve(copy), curve(directory / "local")
        assert [step for step, *_ in losses] == list(range(1, 21))
        np.testing.assert_allclose(losses, expected, rtol=TOLERANCE, atol=0)
        print("largest relative difference", np.max(np.abs(np.array(losses) / np.array(expected) - 1)))
        (copy / "model").symlink_to(local_copy(f"{URL}/model"))
        ours, theirs = weights(copy), weights(directory / "local")
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5, err_msg=name)
        tarsier_jax.load(f"{URL}/model")


if __name__ == "__main__":
    main()
