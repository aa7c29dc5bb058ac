"""States are whole or absent, kept as asked, and read by any number of processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent import futures
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.cli.results import check_mentions
from tests.ranks import Together
from worldline.errors import CheckpointError, Error, InputError
from worldline.parallel.mesh import Axis
from worldline.train.states import FACTS, States


def tensors(step: int) -> dict[str, Tensor]:
    torch.manual_seed(step)
    return {"weights/a": torch.randn(7, 5), "moments/a": torch.randn(7, 5), "b": torch.tensor(step)}


def empty() -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors(0).items()}


def test_a_state_is_restored_with_its_facts(tmp_path: Path) -> None:
    states, changed = States(tmp_path / "run"), tensors(3)
    states.save(3, changed, {"position": {"epoch": 2}})
    changed["weights/a"].zero_()  # after the copy
    states.wait()
    found = empty()
    assert states.restore(3, found) == {"position": {"epoch": 2}}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(3).items())


@pytest.mark.parametrize(
    ("last", "every", "kept"),
    [(1, 0, [9]), (2, 0, [8, 9]), (1, 3, [3, 6, 9]), (3, 4, [4, 7, 8, 9])],
)
def test_some_are_kept(tmp_path: Path, last: int, every: int, kept: list[int]) -> None:
    removed: list[int] = []
    states = States(tmp_path, keep_last=last, keep_every=every, removed=removed.append)
    for step in range(1, 10):
        states.save(step, tensors(step), {})
    states.wait()
    assert states.steps() == kept
    assert {*removed} == {*range(1, 10)} - {*kept}
    assert {path.name for path in tmp_path.iterdir()} == {states.path(s).name for s in kept}


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    states = States(tmp_path)
    states.save(1, tensors(1), {})
    states.wait()
    other = {**empty(), "weights/a": torch.zeros(7, 6)}
    with pytest.raises(CheckpointError, match=r"of 1 tensors the first is weights/a"):
        states.restore(1, other)
    (states.path(1) / FACTS).unlink()
    with pytest.raises(CheckpointError, match="is damaged"):
        states.restore(1, empty())


@pytest.mark.parametrize("damage", ["cut", "facts", "metadata"])
def test_a_damaged_state_is_named_with_the_one_before(tmp_path: Path, damage: str) -> None:
    states = States(tmp_path, keep_last=2)
    for step in (3, 4):
        states.save(step, {"a": torch.ones(4000)}, {"x": step})
    states.wait()
    file = next(
        states.path(4).glob({"facts": "run.json", "metadata": ".metadata"}.get(damage, "*.distcp"))
    )
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError) as raised:
        states.restore(4, {"a": torch.zeros(4000)})
    check_mentions(str(raised.value), f"{states.path(4)} iter_000000003.state")
    assert "\n" not in str(raised.value)


def test_a_state_that_fails_is_reported_though_a_run_ends_by_another_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And at the next line of the log, not at the next state."""
    states = States(tmp_path)

    def full() -> None:
        raise OSError(28, "No space left on device")

    def fail() -> None:
        with states.finished():
            states.save(1, tensors(1), {}, full)
            raise ValueError("of the run")

    with pytest.raises(ValueError, match="of the run"):
        fail()
    assert "No space left" in caplog.text
    states.save(2, tensors(2), {}, full)
    assert states._pending is not None
    futures.wait([states._pending])
    with pytest.raises(Error, match="No space left"):
        states.check()
    with pytest.raises(Error, match="No space left"), states.finished():
        states.save(3, tensors(3), {}, full)


def test_what_cannot_be_written_leaves_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full in the middle of a file."""
    states = States(tmp_path)
    states.save(1, tensors(1), {})
    states.wait()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    states.save(2, tensors(2), {})
    named = r"step 2 cannot be written: No space left on device; iter_000000001\.state is whole"
    with pytest.raises(Error, match=named):
        states.wait()
    assert [path.name for path in tmp_path.iterdir()] == [states.path(1).name]


def test_a_kill_while_pruning_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is beside a state goes first, so that the next run finds the rest by the state."""
    (tmp_path / "1").touch()
    states = States(tmp_path, removed=lambda step: (tmp_path / str(step)).unlink())
    states.save(1, tensors(1), {})
    states.wait()

    def kill(path: Path, target: Path) -> None:
        if path == states.path(1):
            raise OSError(5, "Input/output error")
        replace(path, target)

    replace = Path.replace
    monkeypatch.setattr(Path, "replace", kill)
    states.save(2, tensors(2), {})
    with pytest.raises(Error, match=r"iter_000000002\.state is whole"):
        states.wait()
    assert not (tmp_path / "1").exists()
    monkeypatch.undo()
    again = States(tmp_path, removed=lambda step: (tmp_path / str(step)).unlink(missing_ok=True))
    again.save(3, tensors(3), {})
    again.wait()
    assert again.steps() == [3]


def test_no_room_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = States(tmp_path / "new")
    states.check_room(tensors(0))
    with pytest.raises(InputError, match=r"takes 1000000\.0 GB"):
        states.check_room(tensors(0), beside=10**15)


SCRIPT = """
import sys, torch
from pathlib import Path
from worldline.train.states import States
states = States(Path(sys.argv[1]), keep_last=2)
for step in range(1, 1000):
    states.save(step, {"a": torch.full((1 << 20,), float(step))}, {"step": step})
    print(step, flush=True)
"""


@pytest.mark.slow
def test_kills_leave_whole_states(tmp_path: Path) -> None:
    """Kills at moments of all kinds."""
    states = States(tmp_path)
    for turn in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.01 + 0.031 * turn)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for step in states.steps():
            found = {"a": torch.zeros(1 << 20)}
            assert states.restore(step, found) == {"step": step}
            assert bool((found["a"] == step).all())


def share(axis: Axis, folder: Path) -> dict[str, Tensor]:
    """Save rows of a tensor, and read them back as columns."""
    mesh = init_device_mesh("cpu", (axis.count,))
    rows = {
        name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in tensors(5).items() if t.ndim
    }
    states = States(folder, axis)
    states.save(5, rows, {"count": axis.count})
    states.wait()
    axis.any(False)
    columns: dict[str, Tensor] = {
        name: distribute_tensor(torch.zeros_like(t), mesh, [Shard(1)])
        for name, t in tensors(5).items()
        if t.ndim
    }
    assert states.restore(5, columns) == {"count": axis.count}
    return {n: t.full_tensor() for n, t in columns.items() if isinstance(t, DTensor)}


@pytest.mark.slow
def test_two_write_what_any_number_reads(two: Together, tmp_path: Path) -> None:
    wanted = {name: tensor for name, tensor in tensors(5).items() if tensor.ndim}
    for found in two(share, tmp_path):
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    alone = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    assert States(tmp_path).restore(5, alone) == {"count": 2}
    assert all(torch.equal(alone[name], tensor) for name, tensor in wanted.items())
