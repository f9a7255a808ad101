"""Run by test_processes in two processes: PROCESS PORT FUNCTION [WORKDIR]. Prints the outcome."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from tarsier_jax.errors import InputError
from tarsier_jax.programs import run
from train.processes import check_same_settings, shared_failure


def unlike_settings(process: int, _: Path) -> None:
    check_same_settings("configuration", {"config.seed": 0, "config.num_train_steps": (4, 6)[process]})
    jax.block_until_ready(multihost_utils.process_allgather(np.zeros(2)))


def first_fails(process: int, _: Path) -> None:
    if process == 0:
        raise InputError("The annotations a.jsonl cannot be read.")
    multihost_utils.sync_global_devices("which the other one never reaches")


def second_is_interrupted(process: int, _: Path) -> None:
    if process == 1:
        raise KeyboardInterrupt
    multihost_utils.sync_global_devices("which the other one never reaches")


def mistake(process: int, _: Path) -> None:
    if process == 1:
        raise KeyError("x")
    time.sleep(60)


def split_state(step: int) -> Any:
    """Returns a state of which each process has a part."""
    from train.state import TrainState

    mesh = jax.make_mesh((2,), ("data",))
    split = jax.NamedSharding(mesh, jax.P("data"))
    number = jax.device_put(jnp.int32(0), jax.NamedSharding(mesh, jax.P()))
    values = jax.make_array_from_callback((2, 8), split, lambda index: np.full((2, 8), step, np.float32)[index])
    return TrainState(number + step, {"w": values}, {}, ())


def damage_seen_by_one(process: int, workdir: Path) -> None:
    """Equal settings, and a checkpoint of which one process cannot read its own file."""
    from tests.train.texts import next_number, open_numbers
    from train.checkpoints import Checkpoints, DataProgress

    check_same_settings("configuration", {"config.seed": 0})
    check_same_settings("data", {"data.train": ("5 bytes", "7 bytes")})
    checkpoints, rows = Checkpoints(workdir, keep=2), open_numbers(process, 2)
    for i in (3, 6):
        for _ in range(3):
            next_number(rows)
        checkpoints.save(i, split_state(i), rows, DataProgress(samples=i))
    checkpoints.wait()
    if process == 1:
        (workdir / "checkpoints" / "6" / "data" / "process_1-of-2.json").write_text("{")
    multihost_utils.sync_global_devices("the file is damaged")
    state = split_state(0)
    shapes: Any = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    restored, progress = checkpoints.restore(shapes, rows)
    values = restored.params["w"].addressable_shards[0].data.tolist()
    print("restored", int(restored.step), values[0][0], progress.samples, next_number(rows), checkpoints.latest())
    checkpoints.close()


def killed_in_gs(process: int, workdir: Path) -> None:
    """Both are killed while they save step 9 to gs://bucket/run. Each has a cache of its own, as on two machines."""
    from tests.train.texts import next_number, open_numbers
    from train.checkpoints import Checkpoints, DataProgress
    from train.data.packing import BadSample
    from train.metric_writer import BadSamples
    from train.workdir import open_workdir

    os.environ["XDG_CACHE_HOME"] = str(workdir / str(process))
    with open_workdir("gs://bucket/run") as (directory, store):
        assert store is not None
        checkpoints, rows, bad_samples = Checkpoints(store.url, keep=2), open_numbers(process, 2), BadSamples(directory)
        for step in (3, 6, 9):
            for _ in range(3):
                next_number(rows)
            bad_samples.write([BadSample("a.jsonl", step, f"of process {process}")])
            store.upload()
            checkpoints.save(step, split_state(step), rows, DataProgress(samples=step))
            if step < 9:
                checkpoints.wait()
        pids = multihost_utils.process_allgather(np.array(os.getpid()))
        if process == 0:
            os.kill(int(pids[1]), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


def main() -> None:
    process, port = int(sys.argv[1]), sys.argv[2]
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    with shared_failure():
        globals()[sys.argv[3]](process, Path(sys.argv[4]))


if __name__ == "__main__":
    sys.exit(run(main))
