"""Checkpoints: the saved state is restored, or damage is detected, renamed and reported."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tarsier_jax.errors import CheckpointError
from tests.train.texts import former_state, next_number, open_numbers
from train.best import BestCheckpoint, read_best
from train.checkpoints import Checkpoints, DataProgress, _read_counts, load_parameters
from train.state import TrainState
from train.workdir import saved_steps


def a_state(step: int, dtype: str = "float32") -> TrainState:
    params = {"decoder/norm/weight": jax.random.normal(jax.random.key(step), (256, 1024))}
    frozen = {"vision/norm/weight": jnp.full((64,), step, dtype)}
    return TrainState(jnp.int32(step), params, frozen, (jnp.int32(step), {"mu": params["decoder/norm/weight"] / 2}))


def shapes(state: TrainState) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with checkpoints of the steps 3 and 6; the data has yielded as many elements."""
    workdir = tmp_path_factory.mktemp("run")
    checkpoints, rows = Checkpoints(workdir, keep=2), open_numbers()
    for step in (3, 6):
        assert [next_number(rows) for _ in range(3)][-1] == step - 1
        checkpoints.save(step, a_state(step), rows, DataProgress(samples=step))
    checkpoints.wait()
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(tmp_path: Path, two_checkpoints: Path) -> Path:
    return Path(shutil.copytree(two_checkpoints, tmp_path / "run"))


def restore(workdir: Path, like: TrainState | None = None) -> tuple[TrainState, DataProgress, int]:
    """State, progress, and the next element of the data."""
    checkpoints, rows = Checkpoints(workdir, keep=2), open_numbers()
    state, progress = checkpoints.restore(shapes(like or a_state(0)), rows)
    checkpoints.close()
    number = next_number(rows)
    rows.close()
    return state, progress, number


def assert_restored(workdir: Path, step: int) -> None:
    state, progress, element = restore(workdir)
    jax.tree.map(np.testing.assert_array_equal, state, a_state(step))
    assert (progress.samples, element) == (step, step)


def largest_file(directory: Path) -> Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(file: Path, at: float = 0.5, size: int = 1) -> None:
    """Inverts bits, and leaves everything else."""
    content = bytearray(file.read_bytes())
    start = int(at * len(content))
    for i in range(start, min(start + size, len(content))):
        content[i] ^= 0x01
    file.write_bytes(content)


def flip_all(directory: Path) -> None:
    """Inverts bits at several places of every file that may have values of arrays."""
    for file in directory.rglob("*"):
        if file.is_file() and file.stat().st_size > 10_000:
            for at in (0.2, 0.4, 0.6, 0.8):
                flip(file, at, size=100)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def of_data(checkpoint: Path) -> Path:
    return checkpoint / "data" / "process_0-of-1.json"


def change_a_count(checkpoint: Path) -> None:
    file = checkpoint / "progress" / "metadata"
    file.write_text(file.read_text().replace('"samples": 6', '"samples": 7'))


def skip_elements(checkpoint: Path) -> None:
    file = of_data(checkpoint)
    assert '"num_drawn": 7' in file.read_text()
    file.write_text(file.read_text().replace('"num_drawn": 7', '"num_drawn": 9'))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a bit of an array": lambda c: flip(largest_file(c / "state")),
    "bytes of an array": lambda c: flip(largest_file(c / "state"), size=100),
    "a truncated array": lambda c: truncate(largest_file(c / "state")),
    "an empty array": lambda c: largest_file(c / "state").write_bytes(b""),
    "no array": lambda c: largest_file(c / "state").unlink(),
    "no state": lambda c: shutil.rmtree(c / "state"),
    "a count": change_a_count,
    "truncated counts": lambda c: truncate(c / "progress" / "metadata"),
    "no counts": lambda c: (c / "progress" / "metadata").unlink(),
    "the place in the data": skip_elements,
    "a truncated place in the data": lambda c: truncate(of_data(c)),
    "no place in the data": lambda c: of_data(c).unlink(),
    "an empty directory": lambda c: [shutil.rmtree(path) for path in c.iterdir() if path.is_dir()],
}


def test_the_newest_is_restored(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_restored(workdir, 6)
    assert "damaged" not in capsys.readouterr().out
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "6"]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside(workdir: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    newest = workdir / "checkpoints" / "6"
    DAMAGE[kind](newest)
    content = {path.relative_to(newest): path.read_bytes() for path in newest.rglob("*") if path.is_file()}
    assert_restored(workdir, 3)
    printed = capsys.readouterr().out
    assert f"{newest} is damaged (" in printed and "6.damaged; the run continues from step 3" in printed
    aside = newest.with_name("6.damaged")
    assert content == {path.relative_to(aside): path.read_bytes() for path in aside.rglob("*") if path.is_file()}
    assert_restored(workdir, 3)
    assert "damaged" not in capsys.readouterr().out  # once


def test_a_step_may_be_damaged_twice(workdir: Path) -> None:
    (workdir / "checkpoints" / "6.damaged").mkdir()
    flip(largest_file(workdir / "checkpoints" / "6" / "state"))
    assert_restored(workdir, 3)
    assert (workdir / "checkpoints" / "6.damaged.1" / "state").is_dir()


def test_a_run_saves_the_step_of_a_damaged_checkpoint_again(workdir: Path) -> None:
    flip(largest_file(workdir / "checkpoints" / "6" / "state"))
    checkpoints, rows = Checkpoints(workdir, keep=2), open_numbers()
    checkpoints.restore(shapes(a_state(0)), rows)
    for _ in range(3):
        next(rows)
    checkpoints.save(6, a_state(6), rows, DataProgress(samples=6))
    checkpoints.close()
    assert_restored(workdir, 6)


def test_no_good_checkpoint(workdir: Path) -> None:
    for step in ("3", "6"):
        flip(largest_file(workdir / "checkpoints" / step / "state"))
    with pytest.raises(CheckpointError, match=r"Every checkpoint in .*step 6: .*step 3: .*Nothing was changed"):
        restore(workdir)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "6"]


def test_two_sign_bits(workdir: Path) -> None:
    """Changes that a plain sum of words would not notice."""
    file = largest_file(workdir / "checkpoints" / "6" / "state")
    content = bytearray(file.read_bytes())
    middle = len(content) // 8 * 4
    for i in (middle + 3, middle + 403):
        content[i] ^= 0x80
    file.write_bytes(content)
    assert_restored(workdir, 3)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (a_state(0, "bfloat16"), r"frozen/vision/norm/weight was float32\[64\] and is now bfloat16\[64\]"),
        (
            TrainState(a_state(0).step, a_state(0).params, {}, a_state(0).opt_state),
            r"was float32\[64\] and is now absent",
        ),
        (TrainState(a_state(0).step, a_state(0).params, a_state(0).frozen, ()), r"opt_state/.* is now absent"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_not_damaged(workdir: Path, like: TrainState, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        restore(workdir, like)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "6"]


def test_other_data_is_no_damage(workdir: Path) -> None:
    checkpoints = Checkpoints(workdir, keep=2)
    rows = open_numbers(num_rows=2)
    with pytest.raises(
        CheckpointError, match=r"The data of .*6 cannot continue .*1 rows, not of 2.*another data configuration"
    ):
        checkpoints.restore(shapes(a_state(0)), rows)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "6"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_no_damage(workdir: Path) -> None:
    (workdir / "checkpoints" / "6" / "progress" / "metadata").chmod(0)
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        restore(workdir)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "6"]


def test_errors_that_pass_are_no_damage(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 GiB.")

    monkeypatch.setattr("orbax.checkpoint.PyTreeCheckpointHandler.restore", fail)
    with pytest.raises(CheckpointError, match=r"6 cannot be read \(RESOURCE_EXHAUSTED.*start again"):
        restore(workdir)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "6"]


def of_an_earlier_version(checkpoint: Path) -> None:
    """Removes checksums and fingerprints, and stores the state of the data as that of grain's iterator."""
    progress = checkpoint / "progress" / "metadata"
    counts = json.loads(progress.read_text())
    progress.write_text(json.dumps({k: v for k, v in counts.items() if k not in ("state", "crc32")}))
    rows = json.loads(of_data(checkpoint).read_text())["rows"]
    of_data(checkpoint).write_text(json.dumps(former_state(list(rows.values()))))


def test_checkpoints_of_an_earlier_version(workdir: Path) -> None:
    newest = workdir / "checkpoints" / "6"
    of_an_earlier_version(newest)
    assert_restored(workdir, 6)
    truncate(largest_file(newest / "state"))
    with pytest.raises(CheckpointError, match=r"6 cannot be restored .*or it is damaged"):  # which of them is unknown
        restore(workdir)


def test_values_that_are_not_finite_are_not_saved(workdir: Path) -> None:
    checkpoints, state = Checkpoints(workdir, keep=2), a_state(7)
    state.params["decoder/norm/weight"] = state.params["decoder/norm/weight"].at[3, 5].set(jnp.nan)
    with pytest.raises(CheckpointError, match=r"At step 7 .*not finite, in params/decoder/norm/weight"):
        checkpoints.save(7, state, open_numbers(), DataProgress())
    assert checkpoints.latest() == 6


def test_counts_of_earlier_versions() -> None:
    former = {"samples": 5, "tokens": 90, "cut": 1, "bad": 2, "seen": 7, "state": {}}
    assert _read_counts(former) == DataProgress(samples=5, tokens=90, num_truncated=1, num_bad=2, num_drawn=7)


def test_the_best_stays_with_the_newest(tmp_path: Path) -> None:
    checkpoints, rows = Checkpoints(tmp_path, keep=1), open_numbers()
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, float("nan"))):
        checkpoints.save(step, a_state(step), rows, DataProgress())
        if (best := BestCheckpoint(step, "eval_loss", loss)).is_better_than(checkpoints.best):
            checkpoints.keep_best(best)
    checkpoints.wait()
    checkpoints.close()
    assert saved_steps(tmp_path) == [2, 4] and read_best(tmp_path) == BestCheckpoint(2, "eval_loss", 1.0)
    again = Checkpoints(tmp_path, keep=1)
    assert again.best == BestCheckpoint(2, "eval_loss", 1.0)
    again.save(5, a_state(5), rows, DataProgress())
    again.wait()
    again.close()
    assert saved_steps(tmp_path) == [2, 5]
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    assert Checkpoints(tmp_path, keep=1).best is None  # it was removed, so the next evaluation is the best


def test_which_value_is_better() -> None:
    assert BestCheckpoint(2, "eval_accuracy", 0.5).is_better_than(BestCheckpoint(1, "eval_accuracy", 0.4))
    assert not BestCheckpoint(2, "eval_loss", 0.5).is_better_than(BestCheckpoint(1, "eval_loss", 0.4))
    assert not BestCheckpoint(2, "eval_loss", 0.4).is_better_than(BestCheckpoint(1, "eval_loss", 0.4))
    assert BestCheckpoint(2, "eval_loss", 9.0).is_better_than(BestCheckpoint(1, "eval_accuracy", 0.4))
    assert not BestCheckpoint(2, "eval_loss", float("inf")).is_better_than(None)


def test_a_record_of_the_best_that_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "best.json").write_text('{"step": 2}')
    with pytest.raises(CheckpointError, match=r"best\.json is not a record of the best checkpoint. Remove it"):
        Checkpoints(tmp_path, keep=1)


def test_parameters_are_read_one_by_one(two_checkpoints: Path, workdir: Path) -> None:
    expected = a_state(6)
    assert saved_steps(two_checkpoints) == [3, 6]
    params = load_parameters(two_checkpoints, 6, "float32")
    jax.tree.map(np.testing.assert_array_equal, params, {**expected.params, **expected.frozen})
    assert {x.dtype.name for x in load_parameters(two_checkpoints, 6, "bfloat16").values()} == {"bfloat16"}
    flip_all(workdir / "checkpoints" / "6" / "state")
    with pytest.raises(CheckpointError, match=r"checkpoints/6 is damaged \(.*\)\. Choose another step"):
        load_parameters(workdir, 6, "float32")
