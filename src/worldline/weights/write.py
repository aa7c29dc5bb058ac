"""Save tensors so that a file under its final name is always whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from worldline.files import replacing
from worldline.weights.keymap import KeyMap


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
        ValueError: metadata for a `.pt` file.
        OSError: the folder cannot be written or the disk is full; `path` is then as it was.
    """
    path = Path(path)
    as_pt = path.suffix == ".pt"
    if as_pt and metadata:
        raise ValueError(f"{path.name}: a .pt file has no place for metadata; use .safetensors")
    seen: set[int] = set()
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        held = tensor.detach().cpu().contiguous()
        # Both formats write storages: a view, or a second name of one tensor, needs its own.
        storage = held.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != held.numel() * held.element_size():
            held = held.clone()
        seen.add(held.untyped_storage().data_ptr())
        whole[name] = held
    with replacing(path) as temporary:
        if as_pt:
            torch.save(whole, temporary)
        else:
            text = {key: str(value) for key, value in (metadata or {}).items()}
            try:
                safetensors.torch.save_file(whole, temporary, metadata=text or None)
            except safetensors.SafetensorError as error:
                raise OSError(f"{path} cannot be written: {error}") from error


def save_module(
    module: nn.Module,
    path: Path,
    *,
    keymap: KeyMap | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Save a module's parameters and persistent buffers.

    Args:
        module: on any device.
        path: as for `save`.
        keymap: writes the released names; absent, our own.
        dtype: of floating tensors; absent, as they are.
        metadata: as for `save`.

    Raises:
        ValueError: the key map does not know a tensor of the module.
    """
    tensors = {
        (keymap.released(name) if keymap else name): (
            tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        )
        for name, tensor in module.state_dict().items()
    }
    save(tensors, path, metadata)
