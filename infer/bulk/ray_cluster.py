"""A run on a Ray cluster: a Ray Data dataset of clips, and actors with one engine each.

Ray restarts an actor that dies, and repeats its tasks.
"""

import contextlib
import logging
import math
import os
import pickle
import re
import socket
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import infer
import tarsier_jax
from infer.bulk.config import CaptionConfig, mesh_sizes
from infer.bulk.inputs import Item
from infer.bulk.loading import ItemLoader
from infer.engine import EngineError, Frontend
from tarsier_jax.errors import InputError, TarsierError
from tarsier_jax.programs import prepare_process

_SHARE = 8  # clips per slot in one task
_SHARES = 2  # tasks per actor; the second fills the slots that become free at the end of the first
_RETRIES = 30  # of a task, which may contain a clip that kills actors; a lost node also costs a few
_CONNECT_TIMEOUT = 10  # seconds


def lines_from_ray(
    items: Iterable[Item], config: CaptionConfig, address: str, actors: int | None
) -> Iterator[dict[str, Any]]:
    """Yields the output line of every item once, when its task ends on the cluster.

    Args:
        items: The items, which Ray stores in memory.
        address: Address of the cluster, as in `ray.init`.
        actors: Number of engines; None uses all accelerators, or the CPUs of every node without accelerators.

    Raises:
        InputError: Ray is not installed, the cluster does not answer or is too small, or an actor dies repeatedly.
        CheckpointError: see `CaptionConfig.start`.
    """
    ray = _connect(address)
    try:
        items = list(items)
        room, needs = count_actors(ray.nodes(), math.prod(mesh_sizes(config.mesh).values()))
        actors = room if actors is None else actors
        size = max(1, min(_SHARE * config.slots, math.ceil(len(items) / (_SHARES * actors))))
        shares = [{"items": pickle.dumps(items[i : i + size])} for i in range(0, len(items), size)]
        lines = ray.data.from_items(shares, override_num_blocks=len(shares)).map(
            Captioner,
            fn_constructor_args=(config, os.getcwd()),
            compute=ray.data.ActorPoolStrategy(
                size=actors, max_tasks_in_flight_per_actor=_SHARES, enable_true_multi_threading=True
            ),
            max_concurrency=_SHARES,
            max_task_retries=_RETRIES,
            **needs,
        )
        for share in lines.iter_batches(batch_size=None, prefetch_batches=0):  # each as soon as it ends
            yield from _unpacked(share["lines"][0])
    except ray.exceptions.RayError as error:
        raise InputError(
            f"The run on the Ray cluster failed ({_reason(error)}). See the logs of its nodes. The lines written so "
            "far are complete; start again to resume."
        ) from error
    finally:
        ray.shutdown()


class Captioner:
    """The state of an actor: an engine. Each call captions a share of the clips; calls run concurrently in threads.

    The input is {"items": pickled Items}, the result {"lines": pickled lines, or a pickled TarsierError}.
    """

    def __init__(self, config: CaptionConfig, directory: str):
        prepare_process()
        if os.path.isdir(directory):
            os.chdir(directory)  # relative paths of clips and checkpoints start here
        self._config = config
        try:
            engine = config.start()
            self._resources = contextlib.ExitStack()  # until the process of the actor ends
            prepare = self._resources.enter_context(config.preparer(engine.processor))
            self._frontend = Frontend(engine, config.workers, ItemLoader(prepare, config.prompt))
        except TarsierError as error:  # returned by the calls; Ray would print a traceback and start the actor again
            self._frontend = error

    def __call__(self, share: dict[str, bytes]) -> dict[str, bytes]:
        if isinstance(self._frontend, TarsierError):
            return {"lines": pickle.dumps(self._frontend)}
        try:
            return {"lines": pickle.dumps(list(self._config.lines(self._frontend, pickle.loads(share["items"]))))}
        except EngineError:  # Ray starts a new actor only when the process ends
            traceback.print_exc()
            os._exit(1)


def _connect(address: str) -> ModuleType:
    """Connects to the cluster, which receives this checkout's code, and returns the module. Raises InputError."""
    try:
        import ray.data
        import ray.exceptions
    except ImportError:
        raise InputError("--ray needs Ray Data: pip install -e '.[ray]'.") from None
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")  # no other way to bound retries as of Ray 2.60
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # only reports that progress bars are off
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        if address not in ("auto", "local"):
            _knock(address)
        ray.init(
            address,
            runtime_env={"py_modules": [infer, tarsier_jax]},
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise InputError(
            f"No Ray cluster answers at {address} ({_reason(error)}). Set --ray to the host and port of its head "
            'node, "auto" on one of its nodes, or "local" for this machine alone.'
        ) from None
    return ray


def _knock(address: str) -> None:
    """Raises OSError or ValueError if nothing listens. Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        raise ValueError("no HOST:PORT")
    socket.create_connection((host, int(port)), _CONNECT_TIMEOUT).close()


def count_actors(nodes: Sequence[dict[str, Any]], devices: int) -> tuple[int, dict[str, Any]]:
    """Returns the number of actors that the nodes can run, and the resources of each actor. Raises InputError."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    for kind in ("GPU", "TPU"):
        if any(kind in node for node in alive):
            room = sum(int(node.get(kind, 0)) // devices for node in alive)
            needs = {"num_gpus": devices} if kind == "GPU" else {"resources": {kind: devices}}
            break
    else:
        room, needs = sum(node.get("CPU", 0) >= 1 for node in alive), {"num_cpus": 1}  # an engine uses all CPUs
    if not room:
        raise InputError(
            f"No node of the Ray cluster has {devices} devices, which an engine needs. Choose a smaller --mesh, or "
            "larger nodes."
        )
    return room, needs


def _unpacked(pickled: bytes) -> list[dict[str, Any]]:
    lines = pickle.loads(pickled)
    if isinstance(lines, TarsierError):
        raise lines
    return lines


def _reason(error: Exception) -> str:
    """Returns the first error in the text of a Ray exception, which may be a chain of tracebacks."""
    text = str(error).strip()
    match = re.search(r"^\w[\w.]*(Error|Exception): .+", text, re.MULTILINE)
    return match[0] if match else text.split("\n")[0]
