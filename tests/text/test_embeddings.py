"""Embeddings that come ready in a file."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from worldline.errors import InputError
from worldline.text.embeddings import read_embedding_file, read_embeddings
from worldline.weights.checkpoint import save

ROWS = torch.linspace(-2, 2, 7 * 16).view(7, 16).half().float()


def pickled(path: Path, value: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_embeddings(path, width=16)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_both_prompts(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    path = tmp_path / f"embeddings.{suffix}"
    tensors = {"prompt": ROWS.to(dtype), "negative_prompt": ROWS[None, :2].to(dtype)}
    save(tensors, path)
    found = read_embeddings(path, width=16)
    assert set(found) == {"prompt", "negative_prompt"}
    assert torch.equal(found["prompt"], ROWS.to(dtype).float()[None])
    assert torch.equal(found["negative_prompt"], ROWS[:2].to(dtype).float()[None])


def test_one_tensor_of_any_name(tmp_path: Path) -> None:
    save({"t5": ROWS}, tmp_path / "e.safetensors")
    assert torch.equal(read_embedding_file(tmp_path / "e.safetensors")["prompt"], ROWS)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_saved_tensor(tmp_path: Path, legacy: bool) -> None:
    torch.save(ROWS, tmp_path / "e.pt", _use_new_zipfile_serialization=not legacy)
    assert torch.equal(read_embedding_file(tmp_path / "e.pt")["prompt"], ROWS)


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("fortran", [False, True])
def test_pickles_of_training_data(tmp_path: Path, protocol: int, dtype: str, fortran: bool) -> None:
    array = ROWS.numpy().astype(dtype)
    array = np.asfortranarray(array) if fortran else array
    path = pickled(tmp_path / "e.pickle", [array], protocol)
    assert torch.equal(read_embedding_file(path)["prompt"], ROWS)


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
        ([ROWS.numpy()[0]], "(S, 16)"),
        ([ROWS.numpy()[:0]], "(S, 16)"),
        ([np.full((2, 16), np.inf, "f2")], "finite"),
    ],
)
def test_pickles_of_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: object, message: str
) -> None:
    assert message in refused(pickled(tmp_path / "e.pickle", value))
    assert capsys.readouterr().out == ""


def test_other_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.pt")
    for name in ("nowhere", "fifo.pt", "."):
        assert str(tmp_path / name) in refused(tmp_path / name)
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


def test_rows_and_width(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = read_embeddings(ROWS, ROWS.numpy()[None], width=16, rows=9)
    for tensor in (whole["prompt"], whole["negative_prompt"]):
        assert tensor.shape == (1, 9, 16)
        assert torch.equal(tensor[0, :7], ROWS)
        assert not tensor[0, 7:].any()
    assert read_embeddings(None, width=16) == {}
    assert read_embeddings(ROWS, width=16)["prompt"].shape == (1, 7, 16)
    for wrong, named in (
        ({"rows": 6, "width": 16}, r"prompt_embeddings is float32 \(7, 16\).*S up to 6"),
        ({"width": 8}, r"\(S, 8\)"),
    ):
        with pytest.raises(InputError, match=named):
            read_embeddings(ROWS, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="negative_prompt_embeddings is a int"):
        read_embeddings(ROWS, 3, width=16)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.full((3, 16), torch.nan, dtype=torch.bfloat16),
        torch.full((3, 16), 1e300, dtype=torch.float64),  # infinite in float32
        torch.full((3, 16), torch.nan).to(torch.float8_e4m3fn),
        torch.ones(3, 16, dtype=torch.complex64),
        torch.ones(3, 16, dtype=torch.bool),
        torch.ones(()),
        torch.ones(0, 16),
        torch.ones(2, 3, 16),
    ],
    ids=str,
)
@pytest.mark.parametrize("suffix", ["safetensors", "pt", ""])
def test_tensors_that_are_no_embedding(suffix: str, tensor: torch.Tensor, tmp_path: Path) -> None:
    source: Any = tensor
    if suffix:
        source = tmp_path / f"e.{suffix}"
        save({"prompt": tensor}, source)
    named = re.escape(str(source)) if suffix else "prompt_embeddings"
    with pytest.raises(InputError, match=named):
        read_embeddings(source, width=16)


def test_whose_negative_prompt(tmp_path: Path) -> None:
    both, alone = tmp_path / "both.pt", str(tmp_path / "alone.pt")
    save({"prompt": ROWS, "negative_prompt": 2 * ROWS}, both)
    save({"prompt": 3 * ROWS}, Path(alone))
    for negative, factor in ((None, 2), (alone, 3), (both, 2), (4 * ROWS, 4)):
        found = read_embeddings(both, negative, width=16)
        assert torch.equal(found["negative_prompt"][0], factor * ROWS)
        assert torch.equal(found["prompt"][0], ROWS)
