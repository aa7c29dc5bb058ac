"""Files of weights that no command may take: damaged, hostile, of another kind or not numbers."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from .cases import AR, CV, DIT, FLOW, Case, clip, generate, make_worlds

Header = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def split(data: bytes) -> tuple[Header, bytes]:
    """Header and data of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def whole(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def edited(change: Callable[[Header, list[str]], None]) -> Callable[[bytes], bytes]:
    """A change of the header, which gets the names in the order of their data."""

    def damage(file: bytes) -> bytes:
        header, data = split(file)
        names = sorted(header.keys() - {"__metadata__"}, key=lambda n: header[n]["data_offsets"])
        change(header, names)
        return whole(json.dumps(header).encode(), data)

    return damage


def shift(by: int) -> Callable[[Header, list[str]], None]:
    """Move the data of every tensor but the first."""

    def change(header: Header, names: list[str]) -> None:
        for name in names[1:]:
            header[name]["data_offsets"] = [at + by for at in header[name]["data_offsets"]]

    return change


def set_first(key: str, value: Any) -> Callable[[Header, list[str]], None]:
    return lambda header, names: header[names[0]].update({key: value})


def same_place(header: Header, names: list[str]) -> None:
    """Two tensors of one size at the same bytes."""
    sizes = {name: (header[name]["dtype"], tuple(header[name]["shape"])) for name in names}
    first, second = next((a, b) for a in names for b in names if a < b and sizes[a] == sizes[b])
    header[second]["data_offsets"] = header[first]["data_offsets"]


def named_twice(file: bytes) -> bytes:
    header, data = split(file)
    name = next(iter(header.keys() - {"__metadata__"}))
    text = json.dumps(header)
    return whole(f'{text[:-1]}, "{name}": {json.dumps(header[name])}}}'.encode(), data)


def nested_header(file: bytes) -> bytes:
    return whole(b'{"__metadata__":' + b"[" * 200_000 + b"]" * 200_000 + b"}", split(file)[1])


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "zeros": lambda file: bytes(len(file)),
    "noise": lambda file: bytes((n * 197 + 13) % 251 for n in range(5000)),
    "cut in the header": lambda file: file[:200],
    "cut in the data": lambda file: file[: len(file) // 2],
    "a byte too many": lambda file: file + b"\0",
    "header of 2^60 bytes": lambda file: struct.pack("<Q", 1 << 60) + file[8:],
    "header longer than the file": lambda file: struct.pack("<Q", len(file)) + file[8:],
    "header is a list": lambda file: whole(b"[]      ", split(file)[1]),
    "header of brackets": nested_header,
    "tensors overlap": edited(same_place),
    "a gap": edited(shift(8)),
    "moved back": edited(shift(-4)),
    "shape is negative": edited(set_first("shape", [-1, 4])),
    "shape of 2^62": edited(set_first("shape", [1 << 62, 4])),
    "shape is a text": edited(set_first("shape", "8")),
    "shape of floats": edited(set_first("shape", [8.5])),
    "offsets beyond the file": edited(set_first("data_offsets", [0, 1 << 50])),
    "offsets turned round": edited(set_first("data_offsets", [64, 0])),
    "one offset": edited(set_first("data_offsets", [0])),
    "unknown dtype": edited(set_first("dtype", "F17")),
    "no dtype": edited(lambda header, names: header[names[0]].pop("dtype")),
    "a name twice": named_twice,
    "web page": lambda _: b"<!DOCTYPE html><html><body>Sign in</body></html>" * 100,
    "LFS pointer": lambda _: (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 9\n"
    ),
    "GGUF": lambda _: b"GGUF" + bytes(4000),
    "HDF5": lambda _: b"\x89HDF\r\n\x1a\n" + bytes(4000),
    "gzip": lambda _: b"\x1f\x8b\x08" + bytes(4000),
    "ONNX": lambda _: b"\x08\x07\x12\x07pytorch" + bytes(4000),
    "text": lambda _: b"weights come later\n" * 99,
    "JSON": lambda _: b'{"model_type": "qwen2"}',
    "index of nothing": lambda _: b'{"weight_map": {"a": "no.safetensors"}}',
    "index of itself": lambda _: b'{"weight_map": {"a": "model.safetensors"}}',
    "index that leaves its folder": lambda _: b'{"weight_map": {"a": "../../../etc/passwd"}}',
}


def changed(change: Callable[[Tensors, str], None]) -> Callable[[Tensors], Tensors]:
    """A change of the tensors, which gets the name of a matrix or of a convolution's weight."""

    def damage(tensors: Tensors) -> Tensors:
        name = max(sorted(tensors), key=lambda name: tensors[name].ndim)
        change(tensors, name)
        return tensors

    return damage


def filled(value: float) -> Callable[[Tensors, str], None]:
    return lambda tensors, name: tensors[name][-1, -1:].fill_(value)


CONTENTS: dict[str, Callable[[Tensors], Tensors]] = {
    "NaN": changed(filled(float("nan"))),
    "infinity": changed(filled(float("inf"))),
    "negative infinity": changed(filled(float("-inf"))),
    "a tensor is absent": changed(lambda tensors, name: tensors.pop(name)),
    "a tensor too many": changed(
        lambda tensors, name: tensors.update({f"{name}.own": torch.ones(3)})
    ),
    "transposed": changed(
        lambda tensors, name: tensors.update(
            {name: tensors[name].transpose(0, 1)[:-1].contiguous()}
        )
    ),
    "whole numbers": lambda tensors: {
        name: (value * 10).to(torch.int8) if value.ndim == 2 else value
        for name, value in tensors.items()
    },
    "complex": changed(
        lambda tensors, name: tensors.update({name: tensors[name].to(torch.complex64)})
    ),
    "only adapters": lambda tensors: {
        f"base_model.model.{name.removesuffix('weight')}lora_{half}.weight": torch.ones(4, 4)
        for name in list(tensors)[:6]
        for half in "AB"
    },
    "an optimizer": lambda tensors: {
        f"state.{n}.exp_avg": value for n, value in enumerate(tensors.values())
    },
    "another network": lambda _: {f"conv.{n}.weight": torch.ones(8, 8) for n in range(20)},
    "image model": lambda _: {
        f"double_blocks.{n}.img_attn.qkv.weight": torch.ones(24, 8) for n in range(4)
    },
}


class Call:
    """What pickle stores as a call of a function."""

    def __init__(self, function: Callable[..., Any], *values: Any) -> None:
        self.call = function, values

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def torch_zip(value: Any, record: bytes = b"", *, deflated: bool = False) -> bytes:
    """An archive as `torch.save` writes it, of any value, or of a pickle's bytes."""
    data = value if isinstance(value, bytes) else pickle.dumps(value, 2)
    return zipped({"archive/data.pkl": data, "archive/data/0": record}, deflated=deflated)


def tampered(file: Tensors, old: bytes, new: bytes) -> bytes:
    """What `torch.save` writes, with bytes of its pickle exchanged."""
    buffer = io.BytesIO()
    torch.save(file, buffer)
    result = io.BytesIO()
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(result, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)
    return result.getvalue()


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


MARK = Path("executed")  # of a pickle that runs a command

ARCHIVES: dict[str, Callable[[Tensors], bytes]] = {
    "runs a command": lambda _: torch_zip({"model": Call(os.system, f"touch {MARK}")}),
    "evaluates": lambda _: pickle.dumps(Call(eval, f"open('{MARK}', 'w')")),
    "a megabyte that is 1.5 GB": lambda _: torch_zip({}, bytes(3 << 29), deflated=True),
    "pickle of 120 MB": lambda _: torch_zip(
        b"\x80\x02]" + b"]q\0" * (40 << 20) + b".", deflated=True
    ),
    "nested lists": lambda _: torch_zip(b"\x80\x02" + b"(" * 500_000 + b"l" * 500_000 + b"."),
    "list of numbers": lambda _: torch_zip([1, 2, 3]),
    "a number": lambda _: saved(5),
    "no tensor": lambda _: saved({"epoch": 5, "args": {"lr": 1.0}}),
    "archive without a pickle": lambda _: zipped({"readme.txt": b"nothing"}),
    "arrays of NumPy": lambda _: zipped({"a.npy": b"\x93NUMPY\x01\0" + bytes(200)}),
    "directory cut off": lambda tensors: saved(tensors)[:-100],
    "middle cut out": lambda tensors: (lambda d: d[:5000] + d[9000:])(saved(tensors)),
    "unknown function of torch": lambda tensors: tampered(
        tensors, b"_rebuild_tensor_v2", b"_rebuild_tensor_v9"
    ),
    "unknown storage": lambda tensors: tampered(tensors, b"FloatStorage", b"FloatStorafe"),
    "legacy, cut": lambda tensors: legacy(tensors)[:3000],
    "legacy, of a call": lambda _: (
        pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(Call(os.system, f"touch {MARK}"), 2)
    ),
}


def zipped(members: dict[str, bytes], *, deflated: bool = False) -> bytes:
    buffer = io.BytesIO()
    how = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", how) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def legacy(tensors: Tensors) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def made(kind: str, damage: Callable[[Any], Any], file: Path) -> bytes:
    """Bytes of a damaged file; DAMAGES see its bytes, the others its tensors."""
    if kind == "bytes":
        return damage(file.read_bytes())
    tensors = {name: value.float() for name, value in load_file(file).items()}
    result = damage(tensors)
    return result if kind == "archive" else save(result)


def put(model: str, kind: str, damage: Callable[[Any], Any], inspect: bool) -> list[str]:
    """Write a damaged file over a model's, as one of a single part; the command's words."""
    folder = make_worlds(model) / model
    file = folder / ("decoder.safetensors" if model == CV else "model.safetensors")
    file.write_bytes(made(kind, damage, file))
    if inspect:
        words = ["checkpoints", "inspect", str(folder)]
        return [*words, "--values"] if damage in VALUES else words
    if model == CV:
        return ["tokenize", "reconstruct", "--checkpoint", str(folder), "--video_pattern", clip()]
    return generate(model)


VALUES = [CONTENTS[name] for name in CONTENTS if "N" in name or "infinity" in name]


def special(model: str, make: Callable[[Path], None], inspect: bool) -> list[str]:
    """Put something that is no file in the place of a model's weights."""
    folder = make_worlds(model) / model
    file = folder / "model.safetensors"
    file.unlink()
    make(file)
    return ["checkpoints", "inspect", str(folder)] if inspect else generate(model)


SPECIALS: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "dangling link": lambda path: path.symlink_to("../../blobs/0123"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "absent": lambda path: None,
}


def weights_cases() -> Iterator[Case]:
    """Each damage to one model by the run and by `inspect`; the models take turns."""
    models = cycle((FLOW, DIT, AR, CV))
    kinds = (("bytes", DAMAGES), ("tensors", CONTENTS), ("archive", ARCHIVES))
    for kind, damages in kinds:
        for name, damage in damages.items():
            model = next(models)
            if kind == "tensors" and name == "whole numbers" and model == CV:
                model = next(models)
            for inspect in (False, True):
                does = "inspect" if inspect else "run"
                yield Case(
                    f"{name}, {model}, {does}",
                    partial(put, model, kind, damage, inspect),
                    (model,),
                )
    models = cycle((FLOW, DIT, AR))
    for name, make in SPECIALS.items():
        model = next(models)
        for inspect in (False, True):
            does = "inspect" if inspect else "run"
            yield Case(f"{name}, {model}, {does}", partial(special, model, make, inspect), (model,))
