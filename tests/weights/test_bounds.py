"""Headers that a format forbids are refused, and sizes are checked before memory is spent."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from worldline.errors import CheckpointError
from worldline.weights.checkpoint import open_checkpoint

LEGACY = b"".join(
    pickle.dumps(part, 2) for part in (torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": 1})
)


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert path.name in message
    assert len(message) < 400 + len(str(path))
    assert "\n" not in message
    return message


def header(*tensors: tuple[str, Any, Any], dtype: str = "F16") -> bytes:
    """Header of tensors, each a name, a shape and offsets; names may stand twice."""
    fields = (
        f'"{name}":' + json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})
        for name, shape, offsets in tensors
    )
    return f"{{{','.join(fields)}}}".encode()


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (header(("a", [3], [0, 6]), ("b", [3], [0, 6])), 6),
        (header(("a", [3], [0, 6]), ("b", [3], [4, 10])), 10),
        (header(("a", [3], [0, 6]), ("b", [3], [8, 14])), 14),
        (header(("a", [3], [2, 8])), 8),
        (header(("a", [4], [0, 6])), 6),
        (header(("a", [3], [0, 6]), dtype="F32"), 6),
        (header(("a", [3], [0, 6])), 5),
        (header(("a", [3], [0, 6])), 7),
        (header(("a", [3], [0, 6]), ("a", [3], [0, 6])), 6),
        (header(("a", [-3], [0, 6])), 6),
        (header(("a", [3], [-6, 0])), 6),
        (header(("a", [True], [0, 2])), 2),
        (header(("a", [3.0], [0, 6])), 6),
        (header(("a", [3], [False, 6])), 6),
        (header(("a", [1 << 62, 4], [0, 0])), 0),
        (header(("a", [0, 1 << 63], [0, 0])), 0),
        (header(("a", [2], [0, 1]), dtype="F4"), 1),
        (b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", 0),
        (b'{"a":{"dtype":"F16","dtype":"F16","shape":[1],"data_offsets":[0,2]}}', 2),
        (header(("x" * 300_000, [3], [0, 7])), 7),
    ],
)
def test_headers_that_safetensors_forbids(text: bytes, nbytes: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(nbytes))
    refused(path)


@pytest.mark.parametrize("length", [90_000, 1 << 27, 1 << 63])
def test_header_longer_than_the_file(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + header(("a", [3], [0, 6])) + bytes(6))
    refused(path)


def archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(f"model/{name}", data)
    return path


@pytest.mark.parametrize("member", ["data.pkl", "byteorder", "data/0"])
def test_compressed_members_are_not_inflated(member: str, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as file:
        members = {n: file.read(f"model/{n}") for n in ("data.pkl", "byteorder", "data/0")}
    path = archive(tmp_path / "bomb.pt", members | {member: bytes(1 << 26)}, zipfile.ZIP_DEFLATED)
    before = resident()
    assert "compressed" in refused(path)
    assert resident() - before < 1 << 25


def resident() -> int:
    """Largest memory of this process so far in bytes; 0 where the system does not count it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def doubled(levels: int) -> bytes:
    """Pickle's opcodes of a tuple of 2^levels parts, which share their memory."""
    return b")q\0" + b"h\0h\0\x86q\0" * levels


HOSTILE = {
    "memo": b"\x80\x02}r" + struct.pack("<I", 1 << 31) + b".",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 33) + b".",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b".",
    "sets": b"\x80\x04(" + b"\x8f" * 3_000_000 + b"t.",
    "long": b"\x80\x02(" + b"}" * 5_000_000 + b"t.",
    "key": b"\x80\x02}" + doubled(60) + b"K\1s.",
    "keys": b"\x80\x02}(" + doubled(60) + b"K\1u.",
    "pairs": b"\x80\x02ccollections\nOrderedDict\n]]" + doubled(60) + b"aK\1aa\x85R.",
    "frozenset": b"\x80\x04(" + doubled(60) + b"\x91.",
    "persistent": b"\x80\x02" + doubled(60) + b"Q.",
    "nested": b"\x80\x02" + b"]" * 90_000 + b"a" * 89_999 + b".",
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("pickled", HOSTILE.values(), ids=HOSTILE)
def test_pickles_that_take_more_than_they_hold(
    pickled: bytes, legacy: bool, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    if legacy:
        path.write_bytes(LEGACY + pickled)
    else:
        archive(path, {"data.pkl": pickled})
    before = resident()
    refused(path)
    assert resident() - before < 300 << 20


def edited(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the pickle of an archive."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, change(data) if name.endswith("data.pkl") else data)


def test_records_that_do_not_fit_their_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    tensors: dict[str, Tensor] = {"a": torch.ones(5), "b": torch.zeros(5)}
    torch.save(tensors, path)
    edited(path, lambda data: data.replace(b"FloatStorage", b"DoubleStorage"))
    assert "20 bytes, expected 40" in refused(path)
    torch.save(tensors, path)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        places = [file.getinfo(f"model/data/{n}").header_offset for n in range(2)]
    first, second = (place.to_bytes(4, "little") for place in places)
    assert data.count(second) == 1  # in the directory
    path.write_bytes(data.replace(second, first))
    refused(path)
    torch.save(tensors, path)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as file:
        file.writestr("model/data/0", bytes(20))
    assert "one name" in refused(path)


def test_dict_with_a_key_twice(tmp_path: Path) -> None:
    torch.save({"aa": torch.ones(5), "ab": torch.zeros(5)}, tmp_path / "model.pt")
    edited(tmp_path / "model.pt", lambda data: data.replace(b"ab", b"aa"))
    assert "'aa' twice" in refused(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "text",
    [
        '{"weight_map": {"a": "model.safetensors.index.json"}}',
        '{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}',
        '{"weight_map": {"a": "../1.safetensors"}}',
        '{"weight_map": {"a": "1\\u0000"}}',
        '{"weight_map": {"a": ["1.safetensors"]}}',
        '{"weight_map": ' + "[" * 90_000 + "]" * 90_000 + "}",
        '{"weight_map": {"a": "' + "y" * 90_000 + '"}}',
        '{"weight_map": ' + "1" * 90_000 + "}",
    ],
)
def test_indexes_that_are_none(text: str, tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({"a": torch.ones(number)}, tmp_path / f"{number}.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    refused(path)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"GGUF\3\0\0\0", "GGUF"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"\x1c\0\0\0TFL3", "TensorFlow Lite"),
        (b"\x08\x07\x12\x07pytorch\x1a", "ONNX"),
        (b"\x93NUMPY\1\0", "NumPy"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"a".ljust(257, b"\0") + b"ustar\0", ".nemo"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        (b"<!doctype html>", "web page"),
    ],
)
def test_other_formats_are_named(head: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(head + bytes(600))
    assert name in refused(path)


def test_arrays_of_numpy_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.npz", "w") as file:
        file.writestr("a.npy", b"\x93NUMPY")
    assert "NumPy" in refused(tmp_path / "model.npz")


def test_what_is_no_file(tmp_path: Path) -> None:
    pipe, link, loop = (tmp_path / name for name in ("pipe.pt", "link.pt", "loop.pt"))
    os.mkfifo(pipe)
    assert "regular file" in refused(pipe)
    link.symlink_to("../blobs/0123")
    assert "../blobs/0123" in refused(link)
    loop.symlink_to(loop.name)
    refused(loop)
