"""Every format gives back the saved bits; every damaged file gives one clear line."""

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import io
import json
import os
import pickle
import subprocess
import sys
import types
import uuid
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from worldline.errors import CheckpointError
from worldline.weights import archive
from worldline.weights.checkpoint import Checkpoint, open_checkpoint

TENSORS = {
    "a.weight": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "a.bias": torch.arange(5, dtype=torch.float32),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "flags": torch.tensor([True, False, True]),
    "none": torch.empty(0, 4),
}


def assert_equal(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype == checkpoint.tensors[name].dtype
        assert read.shape == tensor.shape == checkpoint.tensors[name].shape
        assert torch.equal(read, tensor), name


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message or path.name in message
    return message


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".jit"])
def test_zip_pt_by_content(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save(OrderedDict(TENSORS), path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.kind == "pt"
    assert_equal(checkpoint, TENSORS)


def test_legacy_pt(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != "none"}
    torch.save({"model": tensors, "step": 3}, path, _use_new_zipfile_serialization=False)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.kind, checkpoint.nesting, checkpoint.beside) == ("pt", "model", ("step",))
    assert_equal(checkpoint, tensors)
    path.write_bytes(path.read_bytes()[:-20])
    assert "cut short" in refused(path)


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.weights"
    save_file(TENSORS, path, metadata={"step": "3"})
    checkpoint = open_checkpoint(path)
    assert checkpoint.kind == "safetensors"
    assert checkpoint.metadata == {"step": "3"}
    assert_equal(checkpoint, TENSORS)


def test_bytes_that_are_not_aligned(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (1 - len(header) % 2)
    path.write_bytes(len(header).to_bytes(8, "little") + header + torch.ones(2).numpy().tobytes())
    assert torch.equal(open_checkpoint(path).read("x"), torch.ones(2))


def test_parameters_views_and_shared_storage(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).view(4, 6)
    tensors = {
        "rows": base[1:3],
        "columns": base[:, 2:4],
        "transposed": base.t(),
        "parameter": nn.Parameter(base),
        "float8": base.to(torch.float8_e4m3fn),
    }
    torch.save(tensors, tmp_path / "model.pt")
    checkpoint = open_checkpoint(tmp_path / "model.pt")
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name).float(), tensor.detach().float()), name
        assert checkpoint.read(name).stride() == tensor.stride()
    assert checkpoint.tensors["rows"].is_contiguous()
    assert not checkpoint.tensors["columns"].is_contiguous()


def test_training_checkpoint_takes_the_model_and_leaves_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "iter_000000002.pt"
    extra = {
        "a._extra_state": io.BytesIO(b"fp8"),
        "b._extra_state": None,
        "c._extra_state": b"bytes",
    }
    scheduler = {"lr": np.float64(0.5), "betas": (0.9, 0.99), "seen": {1, 2}, "x": np.zeros(2)}
    weights = OrderedDict(TENSORS | extra)
    weights._metadata = OrderedDict(version=1)  # type: ignore[attr-defined]
    torch.save(
        {"model": weights, "optimizer": {0: torch.ones(2)}, "scheduler": scheduler, "iteration": 2},
        path,
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.nesting == "model"
    assert checkpoint.beside == ("optimizer", "scheduler", "iteration")
    assert_equal(checkpoint, TENSORS)


@pytest.mark.parametrize("state", [b"fp8", b""])
@pytest.mark.parametrize("legacy", [False, True])
def test_extra_state_in_old_and_new_files(tmp_path: Path, legacy: bool, state: bytes) -> None:
    path = tmp_path / "model.pt"
    torch.save(
        {"w": torch.ones(2), "w._extra_state": io.BytesIO(state)},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    assert open_checkpoint(path).tensors.keys() == {"w"}


@pytest.mark.parametrize("kind", [tuple, list])
def test_pair_of_tensors(tmp_path: Path, kind: type) -> None:
    torch.save(kind([torch.zeros(3), torch.ones(3)]), tmp_path / "mean_std.pt")
    checkpoint = open_checkpoint(tmp_path / "mean_std.pt")
    assert_equal(checkpoint, {"0": torch.zeros(3), "1": torch.ones(3)})


def test_ema_names_stay(tmp_path: Path) -> None:
    tensors = {"network.a.weight": torch.ones(2), "ema.network-a-weight": torch.zeros(2)}
    torch.save({"model": tensors}, tmp_path / "model.pt")
    assert_equal(open_checkpoint(tmp_path / "model.pt"), tensors)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.tied = self.linear.weight
        self.wide = nn.Parameter(torch.randn(3, 4).t())
        self.register_buffer("levels", torch.tensor([8, 8, 5], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) @ self.wide.t() + self.tied.sum() + self.levels.sum()


@pytest.fixture
def scripted(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    module = nn.Sequential(Block(), nn.ModuleList([Block()])[0]).to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; the released files stay
        compiled = torch.jit.trace(module, torch.zeros(2, 4, dtype=torch.bfloat16))
        torch.jit.save(compiled, str(tmp_path / "encoder.jit"))
    return tmp_path / "encoder.jit", compiled.state_dict()


def test_torchscript(
    scripted: tuple[Path, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tensors = scripted
    monkeypatch.setattr(torch.jit, "load", None)  # never called
    checkpoint = open_checkpoint(path.rename(tmp_path / "encoder.pt"))
    assert checkpoint.kind == "jit"
    assert_equal(checkpoint, tensors)


def rezip(path: Path, to: Path, compression: int, **changes: bytes | None) -> Path:
    """Copy an archive; `changes` replaces (or, by None, leaves out) members by their last part."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w", compression) as new:
        for name in old.namelist():
            data = changes.get(Path(name).name.replace(".", "_"), old.read(name))
            if data is not None and "/code/" not in name:
                new.writestr(name, data)
    return to


def test_archives_that_are_refused(
    scripted: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    path, tensors = scripted
    plain = rezip(path, tmp_path / "plain.jit", zipfile.ZIP_STORED, byteorder=None)
    assert_equal(open_checkpoint(plain), tensors)
    assert "compressed" in refused(rezip(path, tmp_path / "packed.jit", zipfile.ZIP_DEFLATED))
    other = b"big" if sys.byteorder == "little" else b"little"
    path = rezip(path, tmp_path / "other.jit", zipfile.ZIP_STORED, byteorder=other)
    assert "byte order" in refused(path)


def test_golden_jit_and_pt_hold_the_same_bits(golden: Path) -> None:
    folders = [
        encoder.parent
        for case in ("tok_dv_tiny", "tok_cv_tiny")
        for encoder in (golden / case).glob("*/encoder.jit")
        if encoder.with_name("model.pt").exists()
    ]
    if not folders:
        pytest.skip(f"{golden} holds no tokenizer in both formats")
    for folder in folders:
        jit = open_checkpoint(folder / "encoder.jit")
        assert jit.kind == "jit"
        pt = open_checkpoint(folder / "model.pt")
        assert pt.nesting == "model"
        plain = {
            name.replace("_orig_mod.", "").removeprefix("network."): name
            for name in pt.tensors
            if not name.startswith("ema.")
        }
        both = jit.tensors.keys() & plain.keys()
        assert both >= {name for name in jit.tensors if "conv3d" in name}
        for name in both:
            assert torch.equal(jit.read(name), pt.read(plain[name]).to(jit.tensors[name].dtype))


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("/nonexistent/payload",)


@pytest.mark.parametrize("legacy", [False, True])
def test_unsafe_class_is_refused_by_name(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "model.pt"
    torch.save(
        {"w": torch.ones(2), "x": Payload()}, path, _use_new_zipfile_serialization=not legacy
    )
    message = refused(path)
    assert "posix.mkdir" in message or "nt.mkdir" in message


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Settings:
    rate: float = 0.1
    mean: object = None


class Own(nn.Linear):
    pass


class Subclass(Tensor):
    pass


class Call:
    def __init__(self, function: object, *values: object) -> None:
        self.values = function, values

    def __reduce__(self) -> Any:
        return self.values


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "beside",
    [
        argparse.Namespace(lr=1, where=Path("x")),
        datetime.datetime.now(datetime.UTC),
        [Colour.RED, Settings(), decimal.Decimal("0.1"), uuid.uuid4()],
        {"x": collections.defaultdict(list, a=[1]), "y": collections.deque([1]), "z": {1, 2}},
        [np.float32(1), np.zeros(3), np.float64, np.random.default_rng(1), np.dtype("f4")],
        [torch.float16, torch.device("cpu"), torch.Size([2]), int, Any, types.SimpleNamespace(a=1)],
        Settings(mean=torch.ones(3)),
    ],
)
def test_stand_ins_beside_tensors(tmp_path: Path, beside: object, legacy: bool) -> None:
    path, value = tmp_path / "model.pt", {"model": TENSORS, "args": beside}
    if legacy:
        value = {"model": {n: t for n, t in TENSORS.items() if n != "none"}, "args": beside}
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(path)
    assert_equal(checkpoint, value["model"])  # type: ignore[arg-type]
    assert "args" in checkpoint.beside


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Call(Settings, torch.ones(2)), "Settings"),
        (Call(refused, torch.ones(2)), "refused"),
        (Call(subprocess.Popen, ["true"]), "subprocess.Popen"),
        (Call(os.system, "true"), "system"),
        (Call(eval, "1"), "builtins.eval"),
        (functools.partial(print), "builtins.print"),
        ({"w": torch.ones(2).as_subclass(Subclass)}, "Subclass"),
        ({"w": torch.ones(2, 2).to_sparse()}, "_rebuild_sparse_tensor"),
    ],
)
def test_what_would_act_or_build_tensors_is_refused(
    tmp_path: Path, value: object, name: str
) -> None:
    torch.save({"model": TENSORS, "x": value}, tmp_path / "model.pt")
    assert name in refused(tmp_path / "model.pt")


def test_plain_tensors_with_attributes(tmp_path: Path) -> None:
    """FSDP leaves a mark on tensors that it gathers."""
    marked = {name: tensor.clone() for name, tensor in TENSORS.items()}
    for tensor in marked.values():
        tensor._has_been_cloned = True  # type: ignore[attr-defined]
    torch.save(marked, tmp_path / "model.pt")
    assert_equal(open_checkpoint(tmp_path / "model.pt"), TENSORS)


def test_tensors_of_unknown_networks_are_refused_by_name(tmp_path: Path) -> None:
    for value in (Own(2, 2), {"model": Own(2, 2)}):
        torch.save(value, tmp_path / "model.pt")
        assert "test_read.Own" in refused(tmp_path / "model.pt")


def test_containers_in_containers_take_no_time(tmp_path: Path) -> None:
    value: object = [1]
    for _ in range(60):
        value = [value, value]
    torch.save({"x": value, "model": {"a": TENSORS}}, tmp_path / "model.pt")
    assert open_checkpoint(tmp_path / "model.pt").nesting == "model.a"


def test_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    assert "torch.nn.modules.linear.Linear" in refused(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "name", ["builtins.eval", "torch.load", "torch.serialization.load", "builtins.getattr"]
)
def test_unpickler_knows_no_function(name: str) -> None:
    module, _, function = name.rpartition(".")
    with pytest.raises(CheckpointError, match=name):
        archive.Unpickler(Path(), io.BytesIO()).find_class(module, function)


def test_hostile_pickle_changes_nothing(tmp_path: Path) -> None:
    # BUILD with a slot state on what find_class returned would set its attributes.
    torch.save(TENSORS, tmp_path / "x.pt")
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    for target in (b"c__torch__.M\nM\n", b"ccollections\nOrderedDict\n", rebuild):
        text = b"\x80\x02" + target + b"N}X\x08\x00\x00\x00__init__Ns\x86b."
        with pytest.raises(CheckpointError):
            open_checkpoint(
                rezip(tmp_path / "x.pt", tmp_path / "y.pt", zipfile.ZIP_STORED, data_pkl=text)
            )
    torch.save(TENSORS, tmp_path / "model.pt")
    assert_equal(open_checkpoint(tmp_path / "model.pt"), TENSORS)


def test_tensor_past_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(4)}, tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as file:
        pickled = file.read("model/data.pkl")
    grown = pickled.replace(b"K\x04\x85", b"K\x09\x85")
    assert grown != pickled
    path = rezip(tmp_path / "model.pt", tmp_path / "y.pt", zipfile.ZIP_STORED, data_pkl=grown)
    assert "past its storage" in refused(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save(TENSORS, path)
    else:
        save_file(TENSORS, path)
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 40):
        path.write_bytes(whole[:length])
        message = refused(path)
        assert "cut short" in message
        assert f"{length:,} bytes" in message
        assert "download it again" in message
    if suffix == ".safetensors":
        path.write_bytes(whole + b"x")
        assert "damaged" in refused(path)


def test_hole_in_a_preallocated_download(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a": torch.ones(1000), "b": torch.ones(1000)}, path)
    data = bytearray(path.read_bytes())
    data[2000:6000] = bytes(4000)
    path.write_bytes(data)
    assert "damaged" in refused(path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\n<html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 8\n", "git lfs pull"),
        (bytes(600), "zeros"),
        (b'{"dim": 4096}', "text"),
        (b"hello", "no known format"),
        (pickle.dumps({"a": 1}), "no known format"),
    ],
)
def test_not_a_checkpoint(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert part in refused(path)


def test_pickle_that_would_fill_the_memory(tmp_path: Path, monkeypatch) -> None:
    torch.save(TENSORS, tmp_path / "model.pt")
    monkeypatch.setattr(archive, "_LARGEST_PICKLE", 100)
    assert "is refused: its pickle has" in refused(tmp_path / "model.pt")


def test_zip_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as file:
        file.writestr("readme.txt", "hello")
    assert "not one that PyTorch wrote" in refused(tmp_path / "model.pt")


def test_missing_folder_and_no_tensors(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "model.pt")
    torch.save({"grad_scaler": {}, "iteration": 2}, tmp_path / "iter_000000002.pt")
    message = refused(tmp_path / "iter_000000002.pt")
    assert "holds no tensors" in message
    assert "directory" in refused(tmp_path)


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "model.pt").write_bytes(b"x")
    monkeypatch.setattr(Path, "open", deny)  # a file mode would not stop an administrator
    assert "Permission denied" in refused(tmp_path / "model.pt")


def test_index_of_safetensors(tmp_path: Path) -> None:
    parts = {"1.safetensors": {"a": torch.ones(2)}, "2.safetensors": {"b": torch.zeros(3)}}
    for name, tensors in parts.items():
        save_file(tensors, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    assert_equal(open_checkpoint(index), {"a": torch.ones(2), "b": torch.zeros(3)})
    (tmp_path / "2.safetensors").unlink()
    assert "missing: 2.safetensors" in refused(index)
    index.write_text(json.dumps({"weight_map": {"a": "../1.safetensors"}}))
    assert "../1.safetensors" in refused(index)


def test_opening_reads_no_tensor(tmp_path: Path) -> None:
    for path in (tmp_path / "model.pt", tmp_path / "model.safetensors"):
        tensors = {"x": torch.zeros(50_000_000, dtype=torch.uint8)}
        torch.save(tensors, path) if path.suffix == ".pt" else save_file(tensors, path)
        before = _resident()
        checkpoint = open_checkpoint(path)
        assert checkpoint.tensors["x"].nbytes == 50_000_000
        assert _resident() - before < 10_000_000


def _resident() -> int:
    """Bytes of memory in use now; 0 where the system does not count it."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(100_000)}, path)
    checkpoint = open_checkpoint(path)
    os.truncate(path, 200)
    with pytest.raises(CheckpointError, match="cut short while in use"):
        checkpoint.read("x")


def test_tensors_with_attributes_as_fsdp_gathers_them(tmp_path: Path) -> None:
    """Their pickle names torch.Tensor, which here builds nothing by itself."""
    wanted = torch.randn(3, 5).bfloat16()
    tensor = wanted.clone()
    tensor._has_been_cloned = True  # type: ignore[attr-defined]
    torch.save({"a.weight": tensor}, path := tmp_path / "a.pt")
    assert torch.equal(open_checkpoint(path).read("a.weight"), wanted)
