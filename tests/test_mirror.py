"""Outputs in object stores: fsspec's memory, and a Google Cloud Storage server on this machine."""

import json
from pathlib import Path
from typing import Any

import pytest

from tarsier_jax.errors import InputError
from tarsier_jax.mirror import MANIFEST, Mirror, OtherRunError, last_upload, mirrored, output_file
from tests.gcs import gcs_server

URL = "memory://b/run"


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    return tmp_path


def contents(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(directory)): path.read_text() for path in sorted(files)}


def append(directory: Path, *numbers: int) -> None:
    with (directory / "lines.jsonl").open("a") as file:
        file.writelines(f"{number}\n" for number in numbers)


def move_to(name: str, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(machine / name))


def test_another_machine_resumes(store: Any, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_another_machine_resumes(store, URL, machine, monkeypatch)


def test_another_machine_resumes_from_gcs(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with gcs_server() as store:
        assert_another_machine_resumes(store, "gs://bucket/run", machine, monkeypatch)


def assert_another_machine_resumes(store: Any, url: str, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mirrored(url) as directory:
        assert contents(directory) == {}
        append(directory, 1, 2)
        (directory / "run.json").write_text("{}")
        (directory / "checkpoints" / "5").mkdir(parents=True)
        (directory / "checkpoints" / "5" / "state").write_text("five")
        (directory / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()
        (directory / "checkpoints" / "6.orbax-checkpoint-tmp" / "state").write_text("si")
    expected = {"lines.jsonl": "1\n2\n", "run.json": "{}", "checkpoints/5/state": "five"}
    assert {name: store.cat_file(f"{url}/{name}").decode() for name in expected} == expected
    assert len(store.find(url)) == 4  # with the manifest
    move_to("two", machine, monkeypatch)
    with mirrored(url) as directory:
        assert contents(directory) == expected
        append(directory, 3)
        (directory / "checkpoints" / "5" / "state").unlink()
    assert store.cat_file(f"{url}/lines.jsonl") == b"1\n2\n3\n"
    assert not store.exists(f"{url}/checkpoints/5/state")


def test_files_of_several_runs(store: Any, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        for numbers in ("1\n", "2\n"):
            with output_file(f"memory://b/out/{name}") as path, path.open("a") as file:
                file.write(name + numbers)
        move_to("two", machine, monkeypatch)
    objects = {name.removeprefix("/b/out/"): store.cat(name) for name in store.find("/b/out") if ".mirror" not in name}
    assert objects == {"a.jsonl": b"a.jsonl1\na.jsonl2\n", "b.jsonl": b"b.jsonl1\nb.jsonl2\n"}
    with output_file(str(machine / "c.jsonl")) as path:
        assert path == machine / "c.jsonl"


def test_lines_are_uploaded_in_parts(store: Any, tmp_path: Path) -> None:
    mirror = Mirror(URL, tmp_path / "directory")
    mirror.download()
    sizes = []
    for numbers in ((1, 2), (3,), ()):
        append(tmp_path / "directory", *numbers)
        mirror.upload()
        sizes.append(
            sorted(info["size"] for name, info in store.find("/b/run", detail=True).items() if ".part-" in name)
        )
    assert sizes == [[4], [2, 4], [2, 4]]
    (tmp_path / "directory" / "lines.jsonl").write_text("1\n4\n5")  # a resumed run drops lines; the last is incomplete
    mirror.upload()
    other = Mirror(URL, tmp_path / "other")
    other.download()
    assert contents(tmp_path / "other") == {"lines.jsonl": "1\n4\n"}
    mirror.upload(is_last=True)
    assert [name for name in store.find("/b/run") if MANIFEST not in name] == ["/b/run/lines.jsonl"]


def test_parts_of_other_mirrors_stay(store: Any, tmp_path: Path) -> None:
    """Those of a directory below, and of a file beside; the parts of an upload that was cut short are removed."""
    others = [Mirror(f"{URL}/process_1", tmp_path / "below"), Mirror(URL, tmp_path / "beside", "lines.jsonl")]
    for other in others:
        other.download()
        append(other.directory, 1)
        other.upload()
    store.pipe("/b/run/metrics.jsonl.part-1", b"1\n")
    Mirror(URL, tmp_path / "directory").download()
    assert {name.partition(".part-")[0] for name in store.find("/b/run") if ".part-" in name} == {
        "/b/run/process_1/lines.jsonl",
        "/b/run/lines.jsonl",
    }
    others[1].download()
    with last_upload(f"{URL}/process_1", "lines.jsonl") as directory:
        assert contents(directory) == {"lines.jsonl": "1\n"}
    with pytest.raises(InputError, match=r"process_1 lacks a\.json"), last_upload(f"{URL}/process_1", "a.json"):
        pass


def test_a_crash_on_the_same_machine_loses_nothing(store: Any) -> None:
    with pytest.raises(KeyError), mirrored(URL) as directory:
        append(directory, 1)
        raise KeyError
    append(directory, 2)  # written, but not uploaded, by a process that was killed
    with mirrored(URL) as again:
        assert again == directory and contents(directory) == {"lines.jsonl": "1\n2\n"}
    assert store.cat("/b/run/lines.jsonl") == b"1\n2\n"


class Killed(BaseException):
    pass


def test_killed_at_every_operation(store: Any, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each one, another machine finds the state of one upload: no line lost in between, none twice."""
    states = [
        {},
        {"lines.jsonl": "0\n", "a.json": "0", "c/1/s": "1"},
        {"lines.jsonl": "0\n1\n", "a.json": "0", "c/1/s": "1"},
        {"lines.jsonl": "0\n1\n2\n", "a.json": "0", "c/2/s": "2"},
    ]

    def write(directory: Path, state: dict[str, str]) -> None:
        for name in contents(directory).keys() - state.keys():
            (directory / name).unlink()
        for name, text in state.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(text)

    def run(limit: int) -> None:
        """Uploads the states one after the other, and is killed at an operation of the store."""
        operations = iter(range(limit))
        with monkeypatch.context() as patch:
            for name in ("pipe_file", "put_file", "_rm"):
                original = getattr(type(store), name)

                def limited(self: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
                    if next(operations, None) is None:
                        raise Killed
                    return original(self, *args, **kwargs)

                patch.setattr(type(store), name, limited)
            mirror = Mirror(URL, machine / f"killed{limit}")
            mirror.download()
            for state in states[1:]:
                write(machine / f"killed{limit}", state)
                mirror.upload()
            mirror.upload(is_last=True)

    ends, is_whole = [], False
    for limit in range(40):
        store.store.clear()
        try:
            run(limit)
            is_whole = True
        except Killed:
            is_whole = False
        other = Mirror(URL, machine / f"other{limit}")
        other.download()
        state = contents(machine / f"other{limit}")
        ends.append(states.index(state))
        parts = [name for name in store.find("/b/run") if ".part-" in name]
        assert len(parts) <= ends[-1]  # those of an upload that was cut short are removed
        assert not is_whole or {name.removeprefix("/b/run/") for name in store.find("/b/run")} == {*state, MANIFEST}
        if is_whole:
            break
    assert ends == sorted(ends) and set(ends) == {0, 1, 2, 3} and is_whole


def test_failures_are_repeated(store: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mirror = Mirror(URL, tmp_path / "directory")
    mirror.download()
    append(tmp_path / "directory", 1)
    pipe = type(store).pipe_file

    def fail_after(self: Any, path: str, *args: Any, **kwargs: Any) -> None:
        pipe(self, path, *args, **kwargs)
        raise ConnectionError("reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "pipe_file", fail_after)
        with pytest.raises(InputError, match=rf"cannot be written \(reset by peer\).* files are in {tmp_path}"):
            mirror.upload()
    mirror.upload(is_last=True)
    assert store.cat("/b/run/lines.jsonl") == b"1\n"


def test_a_checkpoint_is_removed_during_its_upload(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = Mirror(URL, tmp_path / "directory")
    mirror.download()
    file = tmp_path / "directory" / "checkpoints" / "5" / "state"
    file.parent.mkdir(parents=True)
    file.write_text("five")
    put = type(store).put

    def remove_and_put(*args: Any, **kwargs: Any) -> None:
        file.unlink()
        put(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "put", remove_and_put)
        mirror.upload()
    assert store.cat("/b/run/checkpoints/5/state") == b"five"
    mirror.upload()
    assert not store.exists("/b/run/checkpoints/5/state")
    assert [path.name for path in (tmp_path / "directory").iterdir() if path.name.startswith(".up")] == []


def test_a_second_run_is_noticed(store: Any, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mirrored(URL) as directory, pytest.raises(InputError, match="Another run is writing"), mirrored(URL):
        pass
    with pytest.raises(InputError, match="written by another run meanwhile"), mirrored(URL) as directory:
        append(directory, 1)
        former = Mirror(URL, directory)
        former.download()
        move_to("two", machine, monkeypatch)
        with mirrored(URL) as other:
            append(other, 2)
        with pytest.warns(UserWarning, match="is not up to date"), pytest.raises(OtherRunError):
            former.try_upload()
    assert store.cat("/b/run/lines.jsonl") == b"2\n"


def test_a_manifest_cannot_name_other_files(store: Any, tmp_path: Path) -> None:
    for name in ("../other", str(tmp_path / "other")):
        manifest = {"writer": "1", "files": {name: {"objects": ["a"]}}}
        store.pipe({"/b/run/a": b"1", f"/b/run/{MANIFEST}": json.dumps(manifest).encode()})
        with pytest.raises(InputError, match="names a file outside of the directory"):
            Mirror(URL, tmp_path / "directory").download()
    store.pipe(f"/b/run/{MANIFEST}", b"[")
    with pytest.raises(InputError, match="memory://b/run cannot be read"):
        Mirror(URL, tmp_path / "directory").download()
