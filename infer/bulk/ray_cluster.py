"""A run over a Ray cluster: actors that each hold an engine, over a Ray Data dataset of clips.

Ray starts an actor anew that died, and hands it again what it had in hand.
"""

import logging
import math
import os
import pickle
import re
import socket
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import infer
import tarsier_jax
from infer.bulk.config import CaptionConfig, mesh_sizes
from infer.bulk.inputs import Item
from infer.bulk.loading import LoadStats
from infer.engine import SharedEngine
from tarsier_jax.errors import InputError, TarsierError
from tarsier_jax.programs import prepare_process

_SHARE = 8  # clips a slot, that an actor is handed at once at most
_SHARES = 2  # that an actor has in hand, so that one fills the slots that another leaves at its end
_RETRIES = 30  # of a share: a clip of it may be what kills actors; a few go by before Ray knows that a node is gone
_PATIENCE = 10  # seconds in which a cluster has to answer


def lines_from_ray(
    items: Sequence[Item], config: CaptionConfig, address: str, actors: int | None
) -> Iterator[dict[str, Any]]:
    """The lines of a run's items, each once, as shares of them end on the cluster.

    Args:
        address: of the cluster as `ray.init` takes it.
        actors: how many engines there are; None takes all accelerators, or the CPUs of every node if there are none.

    Raises:
        InputError: there is no Ray, no cluster, or no room on it; or an actor dies over and over.
        CheckpointError: see `CaptionConfig.start`.
    """
    ray = _connect(address)
    try:
        room, needs = find_room(ray.nodes(), math.prod(mesh_sizes(config.mesh).values()))
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
        for share in lines.iter_batches(batch_size=None, prefetch_batches=0):  # each as soon as it is there
            yield from _unpacked(share["lines"][0])
    except ray.exceptions.RayError as error:
        raise InputError(
            f"The work on the Ray cluster ended ({_reason(error)}). The logs of its nodes may say more. What is "
            "written stays; start again to go on."
        ) from error
    finally:
        ray.shutdown()


class Captioner:
    """What an actor holds. Each call captions a share of the clips, several at once in threads of their own.

    A share, {"items": pickled Items}, comes back as {"lines": pickled lines, or the error for which there are none}.
    """

    def __init__(self, config: CaptionConfig, directory: str):
        prepare_process()
        if os.path.isdir(directory):
            os.chdir(directory)  # where the names of clips and checkpoints begin
        self._config = config
        try:
            self._engine = SharedEngine(config.start())
        except TarsierError as error:  # comes out of the calls: Ray would tell it with a traceback, and try again
            self._engine = error

    def __call__(self, share: dict[str, bytes]) -> dict[str, bytes]:
        if isinstance(self._engine, TarsierError):
            return {"lines": pickle.dumps(self._engine)}
        lines = self._config.lines(self._engine, pickle.loads(share["items"]), LoadStats())
        return {"lines": pickle.dumps(list(lines))}


def _connect(address: str) -> ModuleType:
    """Ray, connected, with this checkout's code on its way to all nodes. Raises InputError."""
    try:
        import ray.data
        import ray.exceptions
    except ImportError:
        raise InputError("--ray needs Ray Data: pip install -e '.[ray]'.") from None
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")  # no other way to bound retries as of Ray 2.60
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # says that there are no bars
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
            f"There is no Ray cluster at {address} ({_reason(error)}). Give --ray the host and port of its head "
            'node, "auto" on one of its nodes, or "local" for this machine alone.'
        ) from None
    return ray


def _knock(address: str) -> None:
    """Raises OSError or ValueError where nothing listens; Ray itself would wait for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        raise ValueError("no HOST:PORT")
    socket.create_connection((host, int(port)), _PATIENCE).close()


def find_room(nodes: Sequence[dict[str, Any]], devices: int) -> tuple[int, dict[str, Any]]:
    """How many actors of so many devices there is room for, and what to ask Ray for each. Raises InputError."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    for kind in ("GPU", "TPU"):
        if any(kind in node for node in alive):
            room = sum(int(node.get(kind, 0)) // devices for node in alive)
            needs = {"num_gpus": devices} if kind == "GPU" else {"resources": {kind: devices}}
            break
    else:
        room, needs = sum(node.get("CPU", 0) >= 1 for node in alive), {"num_cpus": 1}  # an engine takes all CPUs
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
    """What Ray's text, which may be a chain of tracebacks, says of the first error in it."""
    text = str(error).strip()
    named = re.search(r"^\w[\w.]*(Error|Exception): .+", text, re.MULTILINE)
    return named[0] if named else text.split("\n")[0]
