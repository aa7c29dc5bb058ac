"""What is saved comes back; what fails leaves the old file."""

import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from worldline.weights import checkpoint
from worldline.weights.checkpoint import Checkpoint, open_checkpoint, save
from worldline.weights.names import ScaledTensor
from worldline.weights.write import cast, write_files

from .memory import MemoryTensor


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    base = torch.arange(12.0).view(3, 4)
    tensors = {"a": base, "shared": base, "columns": base[:, :2], "row": base[1], "t": base.t()}
    save(tensors, tmp_path / name)
    opened = open_checkpoint(tmp_path / name)
    assert opened.tensors.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(opened.read(key), tensor)
    assert (tmp_path / name).stat().st_size < 4096
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_metadata(tmp_path: Path) -> None:
    save({"a": torch.ones(1)}, tmp_path / "a.safetensors", {"step": 3, "preset": "tiny"})
    assert open_checkpoint(tmp_path / "a.safetensors").metadata == {"step": "3", "preset": "tiny"}


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    path = tmp_path / "model.safetensors"
    save({"a": torch.ones(1)}, path)
    before = path.read_bytes()

    def fail(tensors: object, temporary: Path, **_: object) -> None:
        temporary.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", fail)
    with pytest.raises(type(failure)):
        save({"a": torch.zeros(1)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError):  # noqa: PT011 - the text is the system's
        save({"a": torch.ones(1)}, tmp_path / "none" / "a.safetensors")


TENSORS = {
    "a.weight": torch.randn(5, 3, generator=torch.Generator().manual_seed(4)).bfloat16(),
    "b": torch.arange(9.0).view(3, 3).t(),
    "count": torch.tensor(7),
    "none": torch.empty(0, 2),
    "half": torch.ones(3).half(),
    "eighth": torch.ones(2, 2).to(torch.float8_e4m3fn),
    "mask": torch.tensor([True, False]),
}
NAMES = ("m.pt", "m.pth", "m.safetensors", "distributed")


@dataclass(frozen=True)
class Alone(MemoryTensor):
    """A tensor that refuses to be read while another one is in memory."""

    alive: "weakref.WeakSet[Tensor]"

    def read(self) -> Tensor:
        assert len(self.alive) <= 1  # the one before is about to leave
        value = self.tensor.clone()
        self.alive.add(value)
        return value


@pytest.mark.parametrize("name", NAMES)
def test_tensor_by_tensor(tmp_path: Path, name: str) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    entries = {key: Alone(tensor, alive) for key, tensor in TENSORS.items()}
    path, counts = tmp_path / "new" / name, []
    write_files({path: Checkpoint(Path("x"), "", entries)}, counts.append)  # type: ignore[arg-type]
    assert sum(counts) == sum(tensor.nbytes for tensor in TENSORS.values())
    opened = open_checkpoint(path)
    assert opened.tensors.keys() == TENSORS.keys()
    stored = {key: opened.read(key) for key in TENSORS}
    if name.endswith((".pt", ".pth")):
        whole = torch.load(path, mmap=True, weights_only=True)
        assert {tensor.data_ptr() % 64 for tensor in whole.values()} == {0}
        stored |= {"b": whole["b"], "count": whole["count"]}
    elif name.endswith(".safetensors"):
        stored |= load_file(path)
    for key, tensor in TENSORS.items():
        assert stored[key].dtype == tensor.dtype
        assert torch.equal(stored[key].float(), tensor.float()), key


@pytest.mark.parametrize("name", NAMES)
def test_a_failure_on_the_way_leaves_old_files(tmp_path: Path, name: str) -> None:
    class Broken(MemoryTensor):
        def read(self) -> Tensor:
            raise OSError(28, "No space left on device")

    source = Checkpoint(Path("x"), "", {"a": MemoryTensor(torch.ones(2))})  # type: ignore[dict-item]
    write_files({tmp_path / "a.pt": source})
    before = (tmp_path / "a.pt").read_bytes()
    broken = Checkpoint(Path("x"), "", {**source.entries, "b": Broken(torch.ones(2))})  # type: ignore[dict-item]
    outputs = {tmp_path / "a.pt": source, tmp_path / "note": b"x", tmp_path / name: broken}
    with pytest.raises(OSError, match="No space"):
        write_files(outputs)
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]
    assert (tmp_path / "a.pt").read_bytes() == before


def test_precisions(tmp_path: Path) -> None:
    eight = MemoryTensor(torch.full((2, 2), 3.0).to(torch.float8_e4m3fn))
    entries = {key: MemoryTensor(tensor) for key, tensor in TENSORS.items()}
    entries["scaled"] = ScaledTensor(eight, MemoryTensor(torch.tensor(0.5)), (2, 2))  # type: ignore[assignment]
    source = Checkpoint(Path("x"), "", entries)  # type: ignore[arg-type]
    kept, half, narrow = (
        cast(source, *how).tensors
        for how in ((None,), (torch.float16,), (torch.bfloat16, torch.float32))
    )
    assert kept["scaled"].dtype == torch.bfloat16
    assert {key: kept[key].dtype for key in TENSORS} == {k: t.dtype for k, t in TENSORS.items()}
    floats = {key for key, tensor in TENSORS.items() if tensor.is_floating_point()}
    assert all((half[key].dtype == torch.float16) == (key in floats) for key in TENSORS)
    changed = {key for key in TENSORS if narrow[key].dtype != TENSORS[key].dtype}
    assert changed == {"b", "none"}
    assert torch.equal(cast(source, None).read("scaled"), torch.full((2, 2), 1.5).bfloat16())
