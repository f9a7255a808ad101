"""Content in object stores: fsspec's memory, and servers of S3 and Google Cloud Storage on this machine."""

import os
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from infer.bulk.inputs import find_items
from infer.media.fetch import Fetcher
from infer.media.limits import MediaLimits
from infer.media.sources import SourcePolicy, Sources
from tarsier_jax.errors import CheckpointError, InputError
from tarsier_jax.files import check_source, is_remote
from tarsier_jax.processing.video import open_clip
from tarsier_jax.storage import fetch, local_copy
from tarsier_jax.weights import EMBEDDED, EMBEDDED_CLIP, resolve
from tests.eval.judges.servers import serve
from tests.gcs import gcs_server
from tests.hub import Hub
from train.data import AnnotationFile
from train.data.annotations import describe_files, with_root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tarsier_jax" / "objects"


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """A bucket of an S3 server on this machine, as an fsspec file system."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        store = fsspec.filesystem("s3")
        store.mkdir("bucket")
        yield store
    server.stop()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the embedded model and a data set of its clip."""
    clips = tmp_path / "clips"
    (clips / "videos").mkdir(parents=True)
    (clips / "videos" / "a.mp4").write_bytes(EMBEDDED_CLIP.read_bytes())
    (clips / "train.jsonl").write_text('{"messages": []}\n')
    server = Hub({"org/micro": resolve(EMBEDDED), "datasets/org/clips": clips})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.url})  # HF_ENDPOINT is read at the import
    with serve(server):
        yield server
    fsspec.get_filesystem_class("hf").clear_instance_cache()


def test_urls_of_stores() -> None:
    assert all(map(is_remote, ("gs://b/a", "s3://b/a", "hf://org/name")))
    assert not any(map(is_remote, ("a.jsonl", "/gs:/b/a", "https://host/a", "s3:/b/a", "file:///a")))
    assert check_source("--model", "gs://b/m") == "gs://b/m"
    with pytest.raises(InputError, match="--model https://host/m is a URL"):
        check_source("--model", "https://host/m")


def test_a_directory_is_copied_once(store: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.pipe({"/b/m/a.json": b"1", "/b/m/d/c.txt": b"22"})
    copy = local_copy("memory://b/m")
    assert {str(file.relative_to(copy)) for file in copy.rglob("*.*")} == {"a.json", "d/c.txt"}
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "get", lambda *_, **__: pytest.fail("copied again"))
        assert local_copy("memory://b/m") == copy
    assert local_copy("memory://b/m/d/c.txt").read_bytes() == b"22"


def test_a_changed_object_is_copied_again(store: Any) -> None:
    store.pipe("/b/a.jsonl", b"1\n")
    before = local_copy("memory://b/a.jsonl")
    store.pipe("/b/a.jsonl", b"2\n")
    assert local_copy("memory://b/a.jsonl").read_bytes() == b"2\n"
    assert before.read_bytes() == b"1\n"  # a run that reads it is not disturbed


def test_an_interrupted_copy_is_not_used(store: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.pipe({"/b/m/a": b"1", "/b/m/b": b"2"})

    def get(self: Any, names: list[str], targets: list[str], **_: Any) -> None:
        Path(targets[0]).write_bytes(b"")
        raise ConnectionError("reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "get", get)
        with pytest.raises(InputError, match=r"memory://b/m cannot be read \(reset by peer\)"):
            local_copy("memory://b/m")
    assert list(cache.iterdir()) == []
    assert (local_copy("memory://b/m") / "a").read_bytes() == b"1"


def test_two_processes_copy_the_same_content(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store.pipe("/b/a", b"1")
    get = type(store).get

    def get_twice(self: Any, *args: Any, **kwargs: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(type(store), "get", get)
            local_copy("memory://b/a")  # the other process ends first
        get(self, *args, **kwargs)

    monkeypatch.setattr(type(store), "get", get_twice)
    assert local_copy("memory://b/a").read_bytes() == b"1"


def test_annotations(store: Any) -> None:
    store.pipe("/b/a.jsonl", b'{"messages": []}\n{"messages": [1]}\n')
    lines = AnnotationFile("memory://b/a.jsonl")
    assert [line.text for line in lines] == ['{"messages": []}\n', '{"messages": [1]}\n']
    assert lines[1].file == "memory://b/a.jsonl"
    assert describe_files("memory://b/a.jsonl")[0].startswith("35 bytes")
    with pytest.raises(InputError, match=r"memory://b/none\.jsonl does not exist"):
        AnnotationFile("memory://b/none.jsonl")


def test_a_checkpoint_on_an_s3_server(bucket: Any) -> None:
    source = resolve(EMBEDDED)
    bucket.put(f"{source}/", "bucket/micro/", recursive=True)
    directory = resolve("s3://bucket/micro")
    for file in source.iterdir():
        assert (directory / file.name).read_bytes() == file.read_bytes()


def test_a_checkpoint_on_a_gcs_server() -> None:
    source = resolve(EMBEDDED)
    with gcs_server() as store:
        store.put(f"{source}/", "bucket/micro/", recursive=True)
        directory = resolve("gs://bucket/micro")
        with pytest.raises(CheckpointError, match="gs://bucket/none does not exist"):
            resolve("gs://bucket/none")
    for file in source.iterdir():
        assert (directory / file.name).read_bytes() == file.read_bytes()


def test_a_clip(bucket: Any) -> None:
    bucket.put(str(EMBEDDED_CLIP), "bucket/clips/a.mp4")
    clip, local = open_clip("s3://bucket/clips/a.mp4"), open_clip(EMBEDDED_CLIP)
    assert clip.name == "s3://bucket/clips/a.mp4" and clip.length == local.length
    for ours, theirs in zip(clip.read([0, 5]), local.read([0, 5]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(InputError, match=r"s3://bucket/clips/b\.mp4 does not exist"):
        open_clip("s3://bucket/clips/b.mp4")


def test_a_hub(hub: Hub) -> None:
    (line,) = AnnotationFile("hf://datasets/org/clips/train.jsonl")
    assert line.text == '{"messages": []}\n' and line.file == "hf://datasets/org/clips/train.jsonl"
    source, directory = resolve(EMBEDDED), resolve("hf://org/micro")
    assert {file.name for file in directory.iterdir()} == {file.name for file in source.iterdir()}
    for file in source.iterdir():
        assert (directory / file.name).read_bytes() == file.read_bytes()
    num_requests = len(hub.requests)
    assert resolve("hf://org/micro") == directory
    assert not any("/resolve/" in path for path in hub.requests[num_requests:])  # copied once
    (item,) = find_items("hf://datasets/org/clips/videos")
    assert item.input == "hf://datasets/org/clips/videos/a.mp4"
    (frame,), (expected,) = (open_clip(path).read([5]) for path in (item.input, EMBEDDED_CLIP))
    np.testing.assert_array_equal(frame, expected)
    for url in ("hf://datasets/org/clips/b.jsonl", "hf://datasets/org/none/b.jsonl"):
        with pytest.raises(InputError, match=f"{url} does not exist"):
            local_copy(url)


def test_fetched_content_leaves_no_file(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store.pipe("/b/a", b"12")
    content = fetch("memory://b/a")
    with content.open() as first, content.open() as second:
        assert (content.size, first.read(), second.read()) == (2, b"12", b"12")
    assert not list(tmp_path.iterdir())


def test_inputs_of_captioning(store: Any) -> None:
    store.pipe({"/b/c/2.mp4": b"", "/b/c/10.mp4": b"", "/b/c/notes.txt": b""})
    store.pipe("/b/l.jsonl", b'{"input": "x.mp4"}\n{"a": 1}\n')
    for source in ("memory://b/c", "memory://b/c/*"):
        assert [item.input for item in find_items(source)] == ["memory://b/c/2.mp4", "memory://b/c/10.mp4"]
    assert [item.input for item in find_items("memory://b/c/2.mp4")] == ["memory://b/c/2.mp4"]
    assert [item.input for item in find_items("memory://b/l.jsonl")] == ["x.mp4", "memory://b/l.jsonl line 2"]
    with pytest.raises(InputError, match=r"memory://b/none\*/ matches no video, animation or image"):
        find_items("memory://b/none*/")


def test_archives_are_copied_one_after_the_other(store: Any, cache: Path, tmp_path: Path) -> None:
    for name in ("0", "1"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            archive.add(EMBEDDED_CLIP, f"{name}.mp4")
        store.put(str(tmp_path / f"{name}.tar"), f"/b/shards/{name}.tar")
    store.pipe("/b/shards/2.tar", b"")
    cache.mkdir(parents=True)
    for source in ("memory://b/shards", "memory://b/shards/*.tar"):
        shutil.rmtree(cache)
        items = iter(find_items(source))
        assert Path(next(items).input).relative_to(cache).parts[1:] == ("0.tar", "0.mp4")
        assert not list(cache.glob("*/1.tar"))
        second, third = items
        assert open_clip(second.input).length == open_clip(EMBEDDED_CLIP).length
        assert third.input == "memory://b/shards/2.tar" and "2.tar" in third.problem


def test_media_of_annotations() -> None:
    def root(source: str, media_root: str) -> str:
        return with_root({"video_file": source}, media_root)["video_file"]

    assert root("a/./b.mp4", "s3://bucket/videos/") == "s3://bucket/videos/a/b.mp4"
    assert root("/local/a.mp4", "s3://bucket/videos") == "/local/a.mp4"
    assert root("gs://other/a.mp4", "s3://bucket/videos") == "gs://other/a.mp4"


def test_only_the_user_of_this_machine_reads_objects(store: Any) -> None:
    store.pipe("/b/a.png", b"\x89PNG\r\n\x1a\n")
    message = {"content": [{"type": "image", "image": {"image_file": "memory://b/a.png"}}]}
    limits, fetcher = MediaLimits(), Fetcher(())
    with Sources([message], SourcePolicy(Path("/"), fetcher, limits)) as sources:
        assert len(sources.descriptors) == 1
    for root in (None, Path("/tmp")):
        with pytest.raises(InputError, match="object stores are not allowed here"):
            Sources([message], SourcePolicy(root, fetcher, limits))


def test_errors_of_a_store(bucket: Any, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="s3://bucket/none does not exist"):
        resolve("s3://bucket/none")
    with pytest.raises(InputError, match=r"gs://b/a needs a package .* pip install -e '\.\[gcs\]'"):
        monkeypatch.setitem(sys.modules, "gcsfs", None)
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "gs", raising=False)
        local_copy("gs://b/a")
    store.pipe("/b/a", b"1")
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(name, os.devnull)
    with pytest.warns(UserWarning, match="cache"), pytest.raises(InputError, match="needs a directory for its copy"):
        local_copy("memory://b/a")
