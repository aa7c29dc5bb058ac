"""Embeddings that come ready in a file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from worldline.errors import InputError
from worldline.text.embeddings import padded, read_embeddings
from worldline.weights.write import save

ROWS = torch.linspace(-2, 2, 7 * 16).view(7, 16).half().float()


def pickled(path: Path, value: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_embeddings(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_both_prompts(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    path = tmp_path / f"embeddings.{suffix}"
    tensors = {"prompt": ROWS.to(dtype), "negative_prompt": ROWS[None, :2].to(dtype)}
    save(tensors, path)
    found = read_embeddings(path)
    assert list(found) == ["prompt", "negative_prompt"]
    assert torch.equal(found["prompt"], ROWS.to(dtype).float())
    assert torch.equal(found["negative_prompt"], ROWS[:2].to(dtype).float())


def test_one_tensor_of_any_name(tmp_path: Path) -> None:
    save({"t5": ROWS}, tmp_path / "e.safetensors")
    assert torch.equal(read_embeddings(tmp_path / "e.safetensors")["prompt"], ROWS)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_saved_tensor(tmp_path: Path, legacy: bool) -> None:
    torch.save(ROWS, tmp_path / "e.pt", _use_new_zipfile_serialization=not legacy)
    assert torch.equal(read_embeddings(tmp_path / "e.pt")["prompt"], ROWS)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("fortran", [False, True])
def test_pickles_of_training_data(tmp_path: Path, protocol: int, dtype: str, fortran: bool) -> None:
    array = ROWS.numpy().astype(dtype)
    array = np.asfortranarray(array) if fortran else array
    path = pickled(tmp_path / "e.pickle", [array], protocol)
    assert torch.equal(read_embeddings(path)["prompt"], ROWS)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([Payload()], "builtins.print"),
        ([np.array([Payload()])], "refused"),
        ([np.zeros((2, 2), "i4")], "array of 'i4'"),
        ([ROWS.numpy(), ROWS.numpy()], "list of one NumPy array"),
        ({"prompt": ROWS.numpy()}, "list of one NumPy array"),
        ([ROWS.numpy()[0]], "(S, D)"),
        ([ROWS.numpy()[:0]], "(S, D)"),
        ([np.full((2, 2), np.inf, "f2")], "not finite"),
    ],
)
def test_pickles_of_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: object, message: str
) -> None:
    assert message in refused(pickled(tmp_path / "e.pickle", value))
    assert capsys.readouterr().out == ""


def test_other_files(tmp_path: Path) -> None:
    assert "no file" in refused(tmp_path / "nowhere")
    path = tmp_path / "e.safetensors"
    path.write_bytes(b"")
    assert "empty" in refused(path)
    path.write_bytes(b"<!doctype html><title>Sign in</title>")
    assert "web page" in refused(path)
    save({"a": ROWS, "b": ROWS}, path)
    assert "holds a, b" in refused(path)
    save({"negative_prompt": ROWS}, path)
    assert "holds negative_prompt" in refused(path)
    save({"prompt": ROWS.long()}, path)
    assert "floating" in refused(path)
    cut = pickled(tmp_path / "e.pickle", [ROWS.numpy()])
    cut.write_bytes(cut.read_bytes()[:-50])
    assert "damaged" in refused(cut)


def test_padding() -> None:
    whole = padded(ROWS, 9)
    assert whole.shape == (1, 9, 16)
    assert torch.equal(whole[0, :7], ROWS)
    assert not whole[0, 7:].any()
    with pytest.raises(InputError, match="7 rows"):
        padded(ROWS, 6)
