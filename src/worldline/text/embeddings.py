"""Ready embeddings in a file, in place of prompts: ours, or those that training data comes with."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from worldline.errors import CheckpointError, InputError
from worldline.files import disguise
from worldline.weights.read import open_checkpoint

PROMPT, NEGATIVE_PROMPT = "prompt", "negative_prompt"
_LARGEST_PICKLE = 100_000_000  # bytes; a released one has 1 MB at most
_DTYPES = ("f2", "f4", "f8")


def read_embeddings(path: Path) -> dict[str, Tensor]:
    """Read embeddings from a file.

    Args:
        path: either weights (safetensors, or a `.pt` of plain tensors) that hold a tensor `prompt`
            and perhaps `negative_prompt`, or one tensor of any name, which is the prompt's; or a
            pickle as Cosmos' `get_t5_embeddings.py` writes it, a list of one NumPy array. Nothing
            in a pickle is run.

    Returns:
        "prompt", and "negative_prompt" if it is there: (S, D), float32, S of 1 or more.

    Raises:
        InputError: there is no such file, it is damaged or unsafe, or it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file of embeddings {path}")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    pickled = head[:1] == b"\x80" or head[:2] in (b"(l", b"]q")
    # PyTorch's old format starts as a pickle too, with a long integer.
    if pickled and head[2:3] != b"\x8a" and not disguise(head):
        found = {PROMPT: _read_pickle(path)}
    else:
        found = _read_tensors(path)
    return {name: _rows(path, name, tensor) for name, tensor in found.items()}


def padded(embedding: Tensor, length: int) -> Tensor:
    """Return rows (S, D) as (1, length, D), zeros after the last: what an encoder gives.

    Raises:
        InputError: there are more rows than `length`.
    """
    if len(embedding) > length:
        raise InputError(
            f"an embedding has {len(embedding):,} rows; this world attends to {length:,} at most"
        )
    return F.pad(embedding, (0, 0, 0, length - len(embedding)))[None]


def _read_tensors(path: Path) -> dict[str, Tensor]:
    source = open_checkpoint(path)
    if len(source.entries) == 1 and NEGATIVE_PROMPT not in source.entries:
        [name] = source.entries
        return {PROMPT: source.read(name).clone()}
    known = [name for name in (PROMPT, NEGATIVE_PROMPT) if name in source.entries]
    if PROMPT not in known or len(known) != len(source.entries):
        held = ", ".join(sorted(source.entries)[:4])
        raise InputError(
            f"{path} holds {held}; expected one tensor, or {PROMPT} and perhaps {NEGATIVE_PROMPT}"
        )
    return {name: source.read(name).clone() for name in known}


def _rows(path: Path, name: str, tensor: Tensor) -> Tensor:
    rows = tensor[0] if tensor.ndim == 3 and len(tensor) == 1 else tensor
    if rows.ndim != 2 or not rows.numel() or not rows.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise InputError(
            f"{path}: {name} is {kind} {list(tensor.shape)}; an embedding is floating, a row a "
            "token: (S, D) or (1, S, D)"
        )
    rows = rows.float()
    if not rows.isfinite().all():
        raise InputError(f"{path}: {name} has numbers that are not finite")
    return rows


@dataclass
class _DType:
    """A NumPy dtype as a pickle tells it."""

    name: object
    swapped: bool = False

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.swapped = state[1] == ">"

    def numpy(self) -> np.dtype[Any]:
        if self.name not in _DTYPES:
            raise pickle.UnpicklingError(f"an array of {self.name!r:.20}")
        return np.dtype(f"{'>' if self.swapped else '<'}{self.name}")


class _Array:
    """A NumPy array that is being told."""

    value: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran else "C")


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    if not isinstance(dtype, _DType) or not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError("a malformed array")
    array = np.frombuffer(data, dtype.numpy())
    return array.reshape(tuple(shape), order="F" if order == "F" else "C")


class _Unpickler(pickle.Unpickler):
    """Knows NumPy arrays of floating numbers, and builds them itself.

    NumPy's own constructors are never called: they trust what they are told. What `find_class`
    returns are bound methods, so that a hostile pickle cannot change it for the next file.
    """

    def find_class(self, module: str, name: str, /) -> Any:
        package = module.replace("numpy._core", "numpy.core")
        match package, name:
            case "numpy", "ndarray":
                return None  # only ever an argument
            case "numpy", "dtype":
                return self._dtype
            case "numpy.core.multiarray", "_reconstruct":
                return self._empty
            case "numpy.core.numeric", "_frombuffer":
                return self._whole
            case "_codecs", "encode":
                return self._bytes
        raise pickle.UnpicklingError(f"it names {module}.{name}, and loading that could run code")

    def _dtype(self, name: object, *align_and_copy: object) -> _DType:
        return _DType(name)

    def _empty(self, *class_and_shape: object) -> _Array:
        return _Array()

    def _whole(self, data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
        made = _Array()
        made.value = _array(data, dtype, shape, order)
        return made

    def _bytes(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"bytes in {encoding!r:.20}")
        return text.encode("latin1")


def _read_pickle(path: Path) -> Tensor:
    size = path.stat().st_size
    if size > _LARGEST_PICKLE:
        raise InputError(f"{path} is refused: {size:,} bytes are too many for an embedding")
    try:
        with path.open("rb") as file:
            value = _Unpickler(file).load()
    except Exception as error:  # a damaged pickle may raise anything at all
        raise CheckpointError(f"{path} is refused or damaged: {error}") from error
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if not isinstance(value, _Array) or value.value is None:
        raise InputError(f"{path} holds no embedding; expected a list of one NumPy array")
    return torch.from_numpy(value.value.astype(np.float32))
