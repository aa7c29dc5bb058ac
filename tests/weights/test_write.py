"""What is saved comes back; what fails leaves the old file."""

from pathlib import Path

import pytest
import torch

from worldline.weights import checkpoint
from worldline.weights.checkpoint import open_checkpoint, save


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
