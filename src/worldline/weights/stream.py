"""Fill a module that was built on the meta device, tensor by tensor, with no second full copy.

Bytes are read by a few threads straight from the file to their place: the tensor itself on a CPU,
one of two pinned buffers for a GPU. While the GPU fetches one buffer, the threads fill the other;
`read` from the page cache needs no page faults, which is what bounds a copy out of a mapping.
"""

import mmap
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from worldline.errors import CheckpointError
from worldline.weights.checkpoint import (
    Checkpoint,
    FileTensor,
    MergedTensor,
    ShardedTensor,
    Source,
    nonfinite,
    refuse_nonfinite,
)
from worldline.weights.keymap import KeyMap, match, matches
from worldline.weights.names import ScaledTensor

STAGING_BYTES = 64 << 20  # each of two; 1.3 ms at 50 GB/s, far above the cost of starting a copy
_SLICE_BYTES = 4 << 20  # below this a second thread costs more than it brings
_READERS = 8
_HUGE_BYTES = 16 << 20  # below this, pages of 2 MB would waste memory
# bits of infinity; of the one dtype without, of NaN
_INFINITY = {
    torch.float64: 0x7FF << 52,
    torch.float32: 0x7F800000,
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float8_e5m2: 0x7C,
    torch.float8_e4m3fn: 0x7F,
}
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


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
        CheckpointError: the file does not fit the module, and all that is wrong is named; or a
            tensor holds NaN or Inf.
    """
    tensors: dict[str, Tensor] = module.state_dict(keep_vars=True)
    names = Counter(tensors.values())
    # Under which of several names the file holds a shared tensor is all the same.
    shared = [name for name, tensor in tensors.items() if names[tensor] > 1]
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    integers = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    either = [*optional, *shared]
    pairs = match(checkpoint.tensors, shapes, keymap, checkpoint, either, integers)
    sources = {tensors[ours]: theirs for ours, theirs in pairs.items()}
    for name in shared:
        if tensors[name] not in sources and not matches(name, optional):
            raise CheckpointError(f"{checkpoint} does not fit the model: nothing gives {name}")

    values: dict[Tensor, Tensor] = {}
    with torch.no_grad(), ThreadPoolExecutor(_READERS, "weights") as pool:
        copier = Copier(
            torch.device(device), pool, [checkpoint.entries[theirs] for theirs in sources.values()]
        )
        for tensor, theirs in sources.items():
            wanted = dtype if tensor.is_floating_point() else tensor.dtype
            value = copier.fetch(checkpoint.entries[theirs])
            value = value.to(wanted or value.dtype)
            # one for all its names
            values[tensor] = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value
        if not ((copier.finite and copier.scanned) or all_finite(values.values())):
            for tensor, theirs in sources.items():
                refuse_nonfinite(checkpoint.entries[theirs].path, theirs, values[tensor])
    loaded = {name: values[tensor] for name, tensor in tensors.items() if tensor in values}
    module.load_state_dict(loaded, strict=False, assign=True)
    module.to(device)  # buffers that are not in the file


def all_finite(values: Iterable[Tensor]) -> bool:
    """Whether no number of tensors on one device is NaN or Inf; huge ones may count as infinite."""
    wide = [value if value.dtype.itemsize > 1 else value.float() for value in values]
    floats = [value.detach() for value in wide if value.is_floating_point()]
    return bool(get_total_norm(floats).isfinite())  # in a few launches, read once


def nonfinite_tensors(checkpoint: Checkpoint) -> dict[str, str]:
    """Names of the tensors that hold NaN or Inf, and which; all are read."""
    found: dict[str, str] = {}
    with ThreadPoolExecutor(_READERS, "weights") as pool:
        for name, source in checkpoint.entries.items():
            copier = Copier(torch.device("cpu"), pool, [source])
            value = copier.fetch(source)
            if not (copier.finite and copier.scanned) and (kind := nonfinite(value)):
                found[name] = kind
    return found


class Copier:
    """Reads tensors of files to one device, in the order in which they are named at first.

    On a CPU the threads look for numbers that are not finite in what they have just read, while it
    is in their caches. For a GPU they fill one pinned buffer while the other is fetched.

    Attributes:
        staging: for a GPU, two buffers in turn, each with the event of its last copy.
        ahead: the buffers that are being filled, each with the reads that fill it.
        scanned: whether all numbers that were read were looked at.
        finite: whether those are finite.
    """

    def __init__(
        self, device: torch.device, pool: ThreadPoolExecutor, sources: Iterable[Source]
    ) -> None:
        self.device, self.pool = device, pool
        self.scanned = self.finite = True
        self.staging = deque(
            (torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())
            for _ in range(2 if device.type == "cuda" else 0)
        )
        self.pieces = (
            (file, start, min(STAGING_BYTES, file.meta.nbytes - start))
            for source in sources
            for file in _streamed(source)
            for start in range(0, file.meta.nbytes, STAGING_BYTES)
        )
        self.ahead: deque[tuple[Tensor, torch.cuda.Event, list[Future[bool]]]] = deque()
        if self.staging:
            self._fill_next()

    def fetch(self, source: Source) -> Tensor:
        """A tensor in the file's dtype; float32 of a scaled or merged one."""
        if isinstance(source, ShardedTensor) and source.dim is not None:
            parts = [self.fetch(part) for part in source.parts]
            return torch.cat(parts, source.dim) if len(parts) > 1 else parts[0]
        if isinstance(source, MergedTensor):
            merged = source.merge([self.fetch(part) for part in source.parts])
            self.scanned = False  # finite numbers may have a sum that is not
            return merged
        if isinstance(source, ScaledTensor):
            return source.multiply(self.fetch(source.tensor), self.fetch(source.scale))
        if not isinstance(source, FileTensor) or not source.streamed:
            self.scanned = False
            return source.read().to(self.device).contiguous()  # as kernels read it
        value = empty_like(source.meta, self.device)
        data = value.view(-1).view(torch.uint8)
        if not self.staging:
            reads = self._read(data, source, 0, value.dtype)
            finite = [read.result() for read in reads]
            self.finite &= all(finite)
            self.scanned &= value.dtype in _WHOLE or value.dtype in _INFINITY
            return value
        for start in range(0, len(data), STAGING_BYTES):
            part = data[start : start + STAGING_BYTES]
            staging, copied, reads = self.ahead.popleft()
            self._fill_next()  # the threads are never without work
            for read in reads:
                read.result()
            part.copy_(staging[: len(part)], non_blocking=True)
            copied.record(torch.cuda.current_stream(self.device))
        self.scanned = False
        return value

    def _fill_next(self) -> None:
        """Begin to fill a buffer with the next piece, once its last copy has left."""
        for file, start, nbytes in islice(self.pieces, 1):
            staging, copied = self.staging[0]
            self.staging.rotate()
            copied.synchronize()
            self.ahead.append((staging, copied, self._read(staging[:nbytes], file, start)))

    def _read(
        self, buffer: Tensor, file: FileTensor, begin: int, dtype: torch.dtype | None = None
    ) -> list[Future[bool]]:
        """Reads of a tensor's bytes from `begin` on to a uint8 CPU tensor, by several threads.

        With a dtype of `_INFINITY`, each is whether its numbers are finite.
        """
        view = buffer.numpy().data

        def read(start: int) -> bool:
            part = view[start : start + _SLICE_BYTES]
            file.fill(part, begin + start)
            return dtype not in _INFINITY or _is_finite(part, dtype)

        return [self.pool.submit(read, start) for start in range(0, len(view), _SLICE_BYTES)]


def _streamed(source: Source) -> Iterator[FileTensor]:
    """Contiguous tensors of files that make a tensor, in the order in which they are read."""
    if isinstance(source, ShardedTensor) and source.dim is not None:
        for part in source.parts:
            yield from _streamed(part)
    elif isinstance(source, MergedTensor):
        yield from chain.from_iterable(map(_streamed, source.parts))
    elif isinstance(source, ScaledTensor):
        yield from chain(_streamed(source.tensor), _streamed(source.scale))
    elif isinstance(source, FileTensor) and source.streamed:
        yield source


def empty_like(meta: Tensor, device: torch.device) -> Tensor:
    """Uninitialised tensor, contiguous; on a CPU in huge pages, whose first use is faster."""
    if device.type != "cpu" or meta.nbytes < _HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(meta.shape, dtype=meta.dtype, device=device)
    memory = mmap.mmap(-1, meta.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # of a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=meta.dtype).view(meta.shape)


def _is_finite(data: memoryview, dtype: torch.dtype) -> bool:
    """Whether bytes are finite numbers: magnitudes as integers are below that of infinity."""
    size, infinity = dtype.itemsize, _INFINITY[dtype]
    bits = np.frombuffer(data, f"i{size}")
    negative = infinity + (1 << 8 * size - 1)
    return bool(bits.max() < infinity and bits.view(f"u{size}").max() < negative)
