"""Save tensors so that a file under its final name is always whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from worldline.files import replacing


def save(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, object] | None = None
) -> None:
    """Save tensors as safetensors, or, under a name that ends in `.pt`, as PyTorch's flat dict.

    Tensors may be on any device, strided, or share memory (they are then written twice).

    Args:
        tensors: name -> tensor.
        path: its folder must exist; a file there is replaced once the new one is complete.
        metadata: kept in the header as text; safetensors only.

    Raises:
        OSError: the folder cannot be written or the disk is full; `path` is then as it was.
    """
    path = Path(path)
    storages: set[int] = set()
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous()
        # Both formats write storages: a view, or a second name of one tensor, needs its own.
        storage = copy.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != copy.nbytes:
            copy = copy.clone()
        storages.add(copy.untyped_storage().data_ptr())
        whole[name] = copy
    with replacing(path) as temporary:
        if path.suffix == ".pt":
            torch.save(whole, temporary)
            return
        text = {key: str(value) for key, value in (metadata or {}).items()}
        try:
            safetensors.torch.save_file(whole, temporary, metadata=text or None)
        except safetensors.SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
