"""Captioning on a Ray cluster of two nodes: every clip once, whatever dies."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eval.shapes.clips import draw_clips
from eval.shapes.render import write_clip
from infer import caption
from infer.bulk.ray_cluster import count_actors
from tarsier_jax.errors import InputError
from tests.infer.test_caption import FLAGS  # the same programs, so that they are compiled once

LINES, CLIPS = 240, 12
# Ray, which reads them when it is imported, stays on the loopback and tells nobody.
os.environ.update(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_USAGE_STATS_ENABLED="0")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.getbasetemp()))
        patch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "highest")  # as here, so that actors find what was compiled here
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": 2**27}
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        cluster.add_node(**node)
        yield cluster
        cluster.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list that shows every clip several times, and one that is broken."""
    directory = tmp_path_factory.mktemp("clips")
    for i, clip in enumerate(draw_clips(0, CLIPS)):
        write_clip(directory / f"{i}.mp4", clip.video["frames"])
    (directory / "5.mp4").write_text("This is a letter.")
    paths = [str(directory / f"{i % CLIPS}.mp4") for i in range(LINES)]
    source = directory / "list.jsonl"
    source.write_text("".join(json.dumps(path) + "\n" for path in paths))
    return source


def flags(source: Path, output: Path, *others: object) -> list[str]:
    return [str(flag) for flag in ("--input", source, "--output", output, *FLAGS, *others)]


def start(*flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "infer.caption", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def at_work(cluster: Any) -> list[int]:
    """The processes of actors that are captioning."""
    raylets = [node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()]
    children = [pid for raylet in raylets for pid in Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()]
    return [int(pid) for pid in children if "Captioner)).submit" in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.slow
def test_every_clip_once_whatever_dies(cluster: Any, source: Path, one_frame_size: Path, tmp_path: Path) -> None:
    """The program itself is killed; started again, one of its two actors. Captions are those without Ray."""
    alone, output, model = tmp_path / "alone.jsonl", tmp_path / "out.jsonl", ("--model", one_frame_size)
    assert caption.main(caption.parse(flags(source, alone, *model, "--limit", CLIPS))) == 1
    expected = {line["input"]: line.get("caption") for line in read(alone)}

    with start(*flags(source, output, *model, "--ray", cluster.address)) as process:
        wait_for(lambda: len(read(output)) > 0, process)
        process.kill()
    first = read(output)
    with start(*flags(source, output, *model, "--ray", cluster.address)) as process:
        wait_for(lambda: len(read(output)) > len(first) and bool(at_work(cluster)), process)
        os.kill(at_work(cluster)[0], signal.SIGKILL)
        told, _ = process.communicate()
    assert process.returncode == 1 and "will be retried" in told and "Traceback" not in told, told

    lines = read(output)
    assert lines[: len(first)] == first and sorted(line["idx"] for line in lines) == list(range(LINES))
    assert all(line.get("caption") == expected[line["input"]] for line in lines)
    errors = [line for line in lines if "error" in line]
    assert len(errors) == LINES // CLIPS and all("5.mp4" in line["error"] for line in errors)
    assert f"captions and {len(errors) - sum('error' in line for line in first)} errors in" in told
    assert caption.main(caption.parse(flags(source, output, *model, "--ray", cluster.address))) == 1  # nothing to do
    assert read(output) == lines


@pytest.mark.slow
def test_what_an_actor_cannot_load(cluster: Any, source: Path, tmp_path: Path) -> None:
    with start(*flags(source, tmp_path / "out.jsonl", "--ray", cluster.address, "--model", "nowhere")) as process:
        told, _ = process.communicate()
    assert process.returncode == 1 and "error: The directory nowhere does not exist" in told and "Traceback" not in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("others", "message"),
    [
        (("--ray", "127.0.0.1:1"), r"No Ray cluster answers at 127\.0\.0\.1:1 \(.*refused\).*host and port"),
        (("--ray", "somewhere"), r"No Ray cluster answers at somewhere \(no HOST:PORT\)"),
        (("--ray", "auto", "--distributed"), "--ray and --distributed"),
        (("--ray", "auto", "--ray_actors", 0), "--ray_actors is 0; it must be at least 1"),
    ],
)
def test_bad_flags(source: Path, tmp_path: Path, others: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        caption.main(caption.parse(flags(source, tmp_path / "out.jsonl", *others)))


def test_without_ray(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"--ray needs Ray Data: pip install -e '\.\[ray\]'"):
        caption.main(caption.parse(flags(source, tmp_path / "out.jsonl", "--ray", "auto")))


def test_room_on_a_cluster() -> None:
    """An actor's devices lie on one node; nodes that are gone, or only lead, do not count."""

    def nodes(*resources: dict[str, float]) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": each} for each in resources] + [{"Alive": False, "Resources": {"GPU": 8}}]

    gpus = nodes({"CPU": 8}, {"CPU": 8, "GPU": 8}, {"CPU": 8, "GPU": 2})
    assert count_actors(gpus, 1) == (10, {"num_gpus": 1}) and count_actors(gpus, 4) == (2, {"num_gpus": 4})
    assert count_actors(nodes({"CPU": 1}, {"TPU": 8}), 4) == (2, {"resources": {"TPU": 4}})
    assert count_actors(nodes({"CPU": 0}, {"CPU": 4}, {"CPU": 4}), 1) == (2, {"num_cpus": 1})
    with pytest.raises(InputError, match="No node of the Ray cluster has 16 devices"):
        count_actors(gpus, 16)
