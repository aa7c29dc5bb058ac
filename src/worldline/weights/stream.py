"""Fill a module that was built on the meta device, tensor by tensor, with no second full copy.

Bytes are read by a few threads straight from the file to their place: the tensor itself on a CPU,
one of two pinned buffers for a GPU. While the GPU fetches one buffer, the threads fill the other;
`read` from the page cache needs no page faults, which is what bounds a copy out of a mapping.
"""

from collections import Counter, deque
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from worldline.errors import CheckpointError
from worldline.weights.checkpoint import (
    Checkpoint,
    FileTensor,
    ShardedTensor,
    Source,
    read_bytes,
)
from worldline.weights.keymap import KeyMap, match, matches

STAGING_BYTES = 64 << 20  # each of two; 1.3 ms at 50 GB/s, far above the cost of starting a copy
_SLICE_BYTES = 4 << 20  # below this a second thread costs more than it brings
_READERS = 8


def load_into(
    module: nn.Module,
    checkpoint: Checkpoint,
    keymap: KeyMap,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None,
    optional: Collection[str] = (),
) -> None:
    """Give every parameter and persistent buffer of `module` its value from `checkpoint`.

    Names, shapes and kinds are checked before the first byte of data is read. A tensor that two
    names share is read once and stays shared. A buffer that the file does not hold keeps its value
    and moves to `device`; it must not be on the meta device.

    Args:
        module: built on the meta device.
        checkpoint: where the tensors come from.
        keymap: from its names to the module's.
        device: where they go.
        dtype: of floating tensors; None keeps the file's. Integer ones keep the module's.
        optional: our names, or patterns with `*`, that the file may lack.

    Raises:
        CheckpointError: the file does not fit the module; all that is wrong is named.
    """
    tensors: dict[str, Tensor] = module.state_dict(keep_vars=True)
    names = Counter(tensors.values())
    # Under which of several names the file holds a shared tensor is all the same.
    shared = [name for name, tensor in tensors.items() if names[tensor] > 1]
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    pairs = match(checkpoint.tensors, shapes, keymap, checkpoint.path, [*optional, *shared])
    sources = {tensors[ours]: checkpoint.entries[theirs] for ours, theirs in pairs.items()}
    problems = [
        f"{theirs} is {kind} in the file, expected {tensors[ours].dtype}"
        for ours, theirs in pairs.items()
        if (kind := checkpoint.tensors[theirs].dtype).is_floating_point
        != tensors[ours].is_floating_point()
    ]
    problems += [
        f"nothing gives {name}"
        for name in shared
        if tensors[name] not in sources and not matches(name, optional)
    ]
    if problems:
        raise CheckpointError(f"{checkpoint.path} does not fit the model: {problems[0]}")

    values: dict[Tensor, Tensor] = {}
    with torch.no_grad(), ThreadPoolExecutor(_READERS, "weights") as pool:
        copier = Copier(torch.device(device), pool)
        for tensor, source in sources.items():
            wanted = dtype if tensor.is_floating_point() else tensor.dtype
            value = copier.fetch(source).to(wanted or source.meta.dtype)
            # one for all its names
            values[tensor] = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value
    loaded = {name: values[tensor] for name, tensor in tensors.items() if tensor in values}
    module.load_state_dict(loaded, strict=False, assign=True)
    module.to(device)  # buffers that are not in the file


class Copier:
    """Reads tensors of files to one device.

    Attributes:
        staging: for a GPU, two pinned buffers in turn, each with the event of its last copy.
    """

    def __init__(self, device: torch.device, pool: ThreadPoolExecutor) -> None:
        self.device, self.pool = device, pool
        self.staging = deque(
            (torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())
            for _ in range(2 if device.type == "cuda" else 0)
        )

    def fetch(self, source: Source) -> Tensor:
        """A tensor in the file's dtype."""
        if isinstance(source, ShardedTensor) and source.dim is not None:
            return torch.cat([self.fetch(part) for part in source.parts], source.dim)
        if not isinstance(source, FileTensor) or not source.meta.is_contiguous():
            return source.read().to(self.device)
        value = torch.empty_like(source.meta, device=self.device)
        data = value.view(-1).view(torch.uint8)
        if not self.staging:
            self._read(data, source.path, source.position)
            return value
        for start in range(0, len(data), STAGING_BYTES):
            part = data[start : start + STAGING_BYTES]
            staging, copied = self.staging[0]
            copied.synchronize()
            self._read(staging[: len(part)], source.path, source.position + start)
            part.copy_(staging[: len(part)], non_blocking=True)
            copied.record(torch.cuda.current_stream(self.device))
            self.staging.rotate()
        return value

    def _read(self, buffer: Tensor, path: Path, position: int) -> None:
        """Read bytes from a position of a file to a uint8 CPU tensor, by several threads."""
        view = buffer.numpy().data

        def read(start: int) -> None:
            read_bytes(path, position + start, view[start : start + _SLICE_BYTES])

        list(self.pool.map(read, range(0, len(view), _SLICE_BYTES)))
