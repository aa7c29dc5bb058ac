"""Files of weights, written tensor by tensor: one is in memory at a time, whatever the format.

`save` of `weights.checkpoint` is for tensors that are in memory anyhow.
"""

import gc
import io
import json
import pickle
import shutil
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from struct import pack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.storage import _dtype_to_storage_type_map

from worldline.errors import InputError
from worldline.files import check_folder, readable_size, replacing_all
from worldline.weights.checkpoint import _DTYPES, Checkpoint, Source, refuse_nonfinite
from worldline.weights.names import ScaledTensor

PICKLED = (".pt", ".pth")  # suffixes
_ALIGNMENT = 64  # bytes, of PyTorch's storages in an archive
_LOCAL_HEADER = 30 + 20 + 4  # bytes: of a member, of its 64-bit sizes, of the padding's own header
_PIECE = 1 << 22  # numbers
_ROOM = 1 << 20  # bytes for headers
Report = Callable[[int], object]


@dataclass(frozen=True, eq=False)
class CastTensor:
    """A tensor that is read in another dtype."""

    source: Source
    dtype: torch.dtype

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def meta(self) -> Tensor:
        return self.source.meta.to(self.dtype)

    def read(self) -> Tensor:
        return self.source.read().to(self.dtype)


def cast(
    checkpoint: Checkpoint, dtype: torch.dtype | None, only: torch.dtype | None = None
) -> Checkpoint:
    """The same with floating tensors, or those of the dtype `only`, in another dtype.

    Without a dtype, 8-bit floats with scales alone become bfloat16.
    """

    def form(entry: Any) -> Any:
        own = entry.meta.dtype
        fits = own == only if only else own.is_floating_point
        kept = torch.bfloat16 if isinstance(entry, ScaledTensor) else own
        wanted = dtype if dtype and fits else kept
        return entry if wanted == own else CastTensor(entry, wanted)

    return replace(checkpoint, entries={name: form(e) for name, e in checkpoint.entries.items()})


def write_files(
    outputs: Mapping[Path, Checkpoint | bytes], report: Report = lambda _: None
) -> None:
    """Write files that take their places together, once all are on the disk.

    Args:
        outputs: path -> tensors, or the content of a file beside. By suffix, one of `PICKLED` is
            PyTorch's flat dict; without a known one it is the folder of a distributed checkpoint.
        report: is called with the bytes that were written.

    Raises:
        InputError: as `check_outputs`.
        CheckpointError: a tensor cannot be read, or holds NaN or Inf.
    """
    check_outputs(outputs)
    for path in outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_all([*outputs]) as temporaries:
        for temporary, (path, content) in zip(temporaries, outputs.items(), strict=True):
            if not isinstance(content, Checkpoint):
                temporary.write_bytes(content)
            elif path.suffix in PICKLED:
                _write_pickled(content, temporary, report)
            elif path.suffix == ".safetensors":
                _write_safetensors(content, temporary, report)
            else:
                _write_distributed(content, temporary, report)


def check_outputs(outputs: Mapping[Path, Checkpoint | bytes]) -> None:
    """Refuse outputs that are inputs or cannot be written, or too little room (InputError)."""
    tensors = {path: each for path, each in outputs.items() if isinstance(each, Checkpoint)}
    inputs = {file.resolve() for checkpoint in tensors.values() for file in checkpoint.files}
    for path in outputs:
        if path.resolve() in inputs:
            raise InputError(f"{path}: the output is an input; choose another")
        is_file = path.suffix in (*PICKLED, ".safetensors")
        if path.is_dir() and (is_file or any(path.iterdir())):
            raise InputError(f"{path}: a folder has that name; choose another output")
        check_folder(path.parent)
    nbytes = sum(t.nbytes + _ROOM // 1024 for c in tensors.values() for t in c.tensors.values())
    folder = next(path for path in next(iter(outputs)).absolute().parents if path.exists())
    if nbytes + _ROOM > (free := shutil.disk_usage(folder).free):
        raise InputError(
            f"{folder} has room for {readable_size(free)}, {readable_size(nbytes)} are to be "
            "written; choose another folder"
        )


def _read(checkpoint: Checkpoint, name: str, report: Report) -> memoryview:
    """Bytes of a tensor, by rows."""
    data: memoryview = _value(checkpoint, name, report).view(-1).view(torch.uint8).numpy().data
    return data


def _value(checkpoint: Checkpoint, name: str, report: Report) -> Tensor:
    """A tensor with finite numbers alone, contiguous."""
    entry = checkpoint.entries[name]
    value = entry.read().contiguous()
    for part in value.view(-1).split(_PIECE):  # a look at all at once takes twice the memory
        refuse_nonfinite(entry.path, name, part)
    report(value.nbytes)
    return value


def _write_safetensors(checkpoint: Checkpoint, path: Path, report: Report) -> None:
    names = {dtype: name for name, dtype in _DTYPES.items()}
    # the widest first, so that each is aligned
    ordered = sorted(checkpoint.tensors.items(), key=lambda item: -item[1].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # which transformers insists on
    end = 0
    for name, meta in ordered:
        start, end = end, end + meta.nbytes
        header[name] = {
            "dtype": names[meta.dtype],
            "shape": [*meta.shape],
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, _ in ordered:
            file.write(_read(checkpoint, name, report))


class _Storage(NamedTuple):
    kind: Any
    key: str
    numel: int


class _Pickler(pickle.Pickler):
    """Pickles meta tensors as `torch.save` does those on a CPU, each with a storage of its own."""

    count = 0

    def persistent_id(self, item: Any) -> Any:
        if not isinstance(item, _Storage):
            return None
        return "storage", item.kind, item.key, "cpu", item.numel

    def reducer_override(self, item: Any) -> Any:
        if not isinstance(item, Tensor):
            return NotImplemented
        key, self.count = str(self.count), self.count + 1
        strides = torch.empty(item.shape, device="meta").stride()
        rest: Any = 0, tuple(item.shape), strides, False, OrderedDict()
        if name := _dtype_to_storage_type_map().get(item.dtype):
            storage = _Storage(getattr(torch, name), key, item.numel())
            return torch._utils._rebuild_tensor_v2, (storage, *rest)
        storage = _Storage(torch.UntypedStorage, key, item.nbytes)  # of a younger dtype
        return torch._utils._rebuild_tensor_v3, (storage, *rest, item.dtype)


def _write_pickled(checkpoint: Checkpoint, path: Path, report: Report) -> None:
    pickled = io.BytesIO()
    _Pickler(pickled, 2).dump(checkpoint.tensors)
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:

        def add(name: str, content: Callable[[], bytes | memoryview]) -> None:
            member = zipfile.ZipInfo(f"archive/{name}")
            padding = -(file.tell() + _LOCAL_HEADER + len(member.filename)) % _ALIGNMENT
            member.extra = pack("<HH", 0x4246, padding) + bytes(padding)
            with archive.open(member, "w", force_zip64=True) as target:
                target.write(content())

        add("data.pkl", pickled.getvalue)
        add("byteorder", sys.byteorder.encode)
        for key, name in enumerate(checkpoint.entries):
            add(f"data/{key}", lambda name=name: _read(checkpoint, name, report))  # type: ignore[misc]
        add("version", b"3\n".__bytes__)


def _write_distributed(checkpoint: Checkpoint, path: Path, report: Report) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.state_dict_saver import save

    class Planner(DefaultSavePlanner):
        """Plans by headers, and reads a tensor when it is written."""

        def lookup_object(self, index: Any) -> Tensor:
            gc.collect(1)  # torch.save leaves the tensor before in a cycle
            return _value(checkpoint, index.fqn, report)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process
        try:
            save(checkpoint.tensors, checkpoint_id=path, planner=Planner(), no_dist=True)
        except CheckpointException as wrapper:
            raise wrapper.failures[0][0] from None
