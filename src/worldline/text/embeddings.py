"""Embeddings that a caller gives in place of prompts: tensors, arrays, files of several kinds."""

import pickle
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from worldline.errors import CheckpointError, InputError
from worldline.weights.checkpoint import open_checkpoint, read_head

EmbeddingSource = str | Path | Tensor | NDArray[Any]

PROMPT, NEGATIVE_PROMPT = "prompt", "negative_prompt"


def read_embeddings(
    prompt: EmbeddingSource | None,
    negative_prompt: EmbeddingSource | None = None,
    *,
    width: int,
    rows: int | None = None,
) -> dict[str, Tensor]:
    """Embeddings in place of prompts, checked, by the names "prompt" and "negative_prompt".

    Args:
        prompt: (S, width) or (1, S, width); or a file of it and perhaps of the negative prompt's:
            see `read_embedding_file`.
        negative_prompt: the same; wins over the one in the prompt's file.
        width: of the world's context.
        rows: S that the world takes: fewer are filled with zeros, as behind the end of a prompt,
            and more refused. None takes any number as it is.

    Returns:
        Each (1, S, width), float32, on the CPU.

    Raises:
        InputError: there is no such file, it is damaged or unsafe, or holds something else.
    """
    embeddings: dict[str, Tensor] = {}
    for name, source in ((NEGATIVE_PROMPT, negative_prompt), (PROMPT, prompt)):
        label = f"{name}_embeddings"
        if source is None:
            continue
        if isinstance(source, Tensor | np.ndarray):
            try:
                tensors = {name: torch.as_tensor(source)}
            except TypeError as error:  # an array of objects or texts
                raise InputError(f"{label} is an array of {source.dtype}") from error
        elif isinstance(source, str | Path):
            path, label = Path(source), f"{label} {source}"
            try:
                tensors = read_embedding_file(path, path.exists() and path.stat().st_mtime_ns)
            except InputError as error:
                raise InputError(f"{name}_embeddings {error}") from error
            if name == NEGATIVE_PROMPT:  # a file of its own may call it "prompt" all the same
                tensors = {name: tensors.get(name, tensors[PROMPT])}
        else:
            raise InputError(f"{label} is a {type(source).__name__}; give a file or tensor")
        for kind, tensor in tensors.items():
            embeddings.setdefault(kind, _checked(tensor, label, width, rows))
    return embeddings


def _checked(tensor: Tensor, label: str, width: int, rows: int | None) -> Tensor:
    """An embedding as (1, S, width), float32, with zeros up to S = `rows`."""
    flat = tensor[0] if tensor.ndim == 3 and len(tensor) == 1 else tensor
    fits = flat.ndim == 2 and 0 < len(flat) <= (rows or len(flat)) and flat.shape[1] == width
    if not fits or not flat.is_floating_point() or not flat.float().isfinite().all():
        dtype = str(tensor.dtype).removeprefix("torch.")
        most = "" if rows is None else f" with S up to {rows}"
        raise InputError(
            f"{label} is {dtype} {tuple(tensor.shape)}; it must be floating and finite, "
            f"(S, {width}) or (1, S, {width}){most}"
        )
    return F.pad(flat.detach().float().cpu(), (0, 0, 0, (rows or len(flat)) - len(flat)))[None]


@lru_cache(maxsize=4)  # a batch reads its file once
def read_embedding_file(path: Path, modified: int = 0) -> dict[str, Tensor]:
    """Tensors "prompt" and perhaps "negative_prompt" of a file, of any shape and dtype.

    It is either weights (safetensors, or a `.pt` of plain tensors) that hold a tensor `prompt` and
    perhaps `negative_prompt`, or one tensor of any name, which is the prompt's; or a pickle as
    Cosmos' `get_t5_embeddings.py` writes it (protocol 3 or later), a list of one NumPy array.
    Nothing in a pickle is run. A file of another time, `modified`, is read anew.

    Raises:
        InputError: there is no such file, it is damaged or unsafe, or holds something else.
    """
    head = read_head(path)
    # PyTorch's old format starts as a pickle too, with a long integer.
    if head[:1] == b"\x80" and head[2:3] != b"\x8a":
        return {PROMPT: _read_pickle(path)}
    source = open_checkpoint(path)
    names = sorted(source.entries)
    if len(names) == 1 and names != [NEGATIVE_PROMPT]:
        return {PROMPT: source.read(names[0])}
    if names != [NEGATIVE_PROMPT, PROMPT]:
        raise InputError(
            f"{path} holds {', '.join(names[:4])}; expected one tensor, or {PROMPT} and perhaps "
            f"{NEGATIVE_PROMPT}"
        )
    return {name: source.read(name) for name in names}


class _DType:
    """A NumPy dtype in a pickle: the name that `np.frombuffer` takes."""

    def __init__(self, name: object, *align_and_copy: object) -> None:
        self.name = name

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.name = f"{state[1]}{self.name}"


class _Array:
    """A NumPy array in a pickle: its bytes, dtype, shape and order."""

    def __init__(self, *fields: Any) -> None:
        self.fields = fields

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, fortran, data = state
        self.fields = data, dtype, shape, "F" if fortran else "C"

    def read(self) -> Tensor:
        data, dtype, shape, order = self.fields
        if not re.fullmatch("[<>]f[248]", dtype.name):
            raise pickle.UnpicklingError(f"an array of {dtype.name[1:]!r:.20}")
        array = np.frombuffer(data, dtype.name).reshape(shape, order=order)
        return torch.from_numpy(array.astype(np.float32))


_CLASSES: dict[str, type | None] = {
    "numpy.ndarray": None,  # only ever an argument
    "numpy.dtype": _DType,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.core.numeric._frombuffer": _Array,
}


class _Unpickler(pickle.Unpickler):
    """Reader of arrays of floating numbers, which it builds itself.

    NumPy's own constructors trust their arguments and are never called. A pickle cannot change our
    classes for the next file: what it sets goes through their `__setstate__`.
    """

    def find_class(self, module: str, name: str, /) -> Any:
        full = f"{module}.{name}".replace("numpy._core", "numpy.core")
        if full in _CLASSES:
            return _CLASSES[full]
        raise pickle.UnpicklingError(f"it names {full}, and loading that could run code")


def _read_pickle(path: Path) -> Tensor:
    try:
        with path.open("rb") as file:
            match _Unpickler(file).load():
                case [_Array() as array] | (_Array() as array):
                    return array.read()
    except Exception as error:  # a damaged pickle may raise anything at all
        raise CheckpointError(f"{path} is refused or damaged: {error}") from error
    raise InputError(f"{path} holds no embedding; expected a list of one NumPy array")
