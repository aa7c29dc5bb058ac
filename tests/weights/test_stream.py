"""A module built on meta gets the file's bits, on the device and in the dtype asked for."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from worldline.errors import CheckpointError
from worldline.weights import stream
from worldline.weights.checkpoint import Checkpoint, FileTensor, open_checkpoint
from worldline.weights.keymap import KeyMap
from worldline.weights.stream import load_into

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

KEYS = KeyMap(
    rename={
        "first.w": "first.weight",
        "first.b": "first.bias",
        "second.w": "second.weight",
        "tied.w": "tied.weight",
        "levels": "levels",
        "taps": "taps",
    },
    prefixes=("net.", ""),
)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 5, bias=False)
        self.tied = nn.Linear(5, 5, bias=False)
        self.tied.weight = self.second.weight
        self.first.weight.requires_grad_(False)
        self.taps: Tensor
        self.register_buffer("levels", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("taps", torch.full((2,), 0.5, device="cpu"))
        self.register_buffer("table", torch.arange(3.0, device="cpu"), persistent=False)


def saved(path: Path, **changes: Tensor | None) -> Checkpoint:
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor | None] = {
        "net.first.w": torch.randn(5, 6, generator=generator),
        "net.first.b": torch.randn(5, generator=generator),
        "net.second.w": torch.randn(5, 5, generator=generator),
        "net.levels": torch.tensor([8, 8, 5], dtype=torch.int32),
    }
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    whole = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    torch.save(whole, path) if path.suffix == ".pt" else save_file(whole, path)
    return open_checkpoint(path)


def empty() -> Small:
    with torch.device("meta"):
        return Small()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_values(
    tmp_path: Path, device: str, dtype: torch.dtype | None, name: str, monkeypatch
) -> None:
    monkeypatch.setattr(stream, "STAGING_BYTES", 16)  # every tensor takes several turns
    monkeypatch.setattr(stream, "_SLICE_BYTES", 8)
    checkpoint = saved(tmp_path / name)
    module = empty()
    load_into(module, checkpoint, KEYS, device=device, dtype=dtype, optional=["taps"])
    wanted = dtype or torch.float32
    assert torch.equal(module.first.weight.cpu(), checkpoint.read("net.first.w").to(wanted))
    assert torch.equal(module.first.bias.cpu(), checkpoint.read("net.first.b").to(wanted))
    assert torch.equal(module.second.weight.cpu(), checkpoint.read("net.second.w").to(wanted))
    assert module.levels.dtype == torch.int64
    assert module.levels.tolist() == [8, 8, 5]
    assert module.taps.tolist() == [0.5, 0.5]
    assert {tensor.device.type for tensor in module.state_dict().values()} == {device}
    assert module.table.device.type == device


def test_shared_and_frozen_parameters_stay_so(tmp_path: Path) -> None:
    module = empty()
    checkpoint = saved(tmp_path / "model.pt")
    load_into(module, checkpoint, KEYS, device="cpu", dtype=torch.float32, optional=["taps"])
    assert module.tied.weight is module.second.weight
    assert [p.requires_grad for p in module.first.parameters()] == [False, True]
    either = saved(tmp_path / "b.pt", net__second__w=None, net__tied__w=torch.ones(5, 5))
    module = empty()
    load_into(module, either, KEYS, device="cpu", dtype=torch.float32, optional=["taps"])
    assert module.second.weight.sum() == 25
    neither = saved(tmp_path / "c.pt", net__second__w=None)
    with pytest.raises(CheckpointError, match=r"nothing gives second\.weight"):
        load_into(empty(), neither, KEYS, device="cpu", dtype=None, optional=["taps"])


def test_buffer_from_the_file_wins(tmp_path: Path) -> None:
    module = empty()
    checkpoint = saved(tmp_path / "model.pt", net__taps=torch.tensor([0.25, 0.25]).bfloat16())
    load_into(module, checkpoint, KEYS, device="cpu", dtype=torch.float32, optional=["taps"])
    assert module.taps.tolist() == [0.25, 0.25]


def test_nothing_is_read_when_the_file_does_not_fit(tmp_path: Path, monkeypatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("data were read")

    monkeypatch.setattr(FileTensor, "read", read)
    monkeypatch.setattr(FileTensor, "fill", read)
    module = empty()
    for changes, message in (
        ({"net__first__w": torch.ones(5, 7)}, r"\[5, 7\] in the file, expected \[5, 6\]"),
        ({"net__first__b": None}, "1 missing: net.first.b"),
        ({"net__extra": torch.ones(1)}, "1 unknown: net.extra"),
        ({"net__levels": torch.ones(3)}, r"net\.levels is torch\.float32 in the file"),
        ({"net__second__w": torch.ones(5, 5).char()}, r"net\.second\.w is torch\.int8 in the file"),
    ):
        checkpoint = saved(tmp_path / "model.pt", **changes)
        with pytest.raises(CheckpointError, match=message):
            load_into(module, checkpoint, KEYS, device="cpu", dtype=None, optional=["taps"])
    assert module.first.weight.is_meta


def test_no_map_of_the_file_remains(tmp_path: Path) -> None:
    maps = Path("/proc/self/maps")
    module = empty()
    strided = torch.randn(6, 5).t()
    checkpoint = saved(tmp_path / "model.pt", net__first__w=strided)
    load_into(module, checkpoint, KEYS, device="cpu", dtype=torch.float32, optional=["taps"])
    assert torch.equal(module.first.weight, strided)
    if maps.exists():
        assert str(tmp_path) not in maps.read_text()


BAD = {"NaN": torch.nan, "-NaN": -torch.nan, "Inf": torch.inf, "-Inf": -torch.inf}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stored", [*FLOATS, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("place", [0, 4999, 12_345])
def test_numbers_that_are_not_finite(
    tmp_path: Path, device: str, stored: torch.dtype, kind: str, place: int, monkeypatch
) -> None:
    monkeypatch.setattr(stream, "_SLICE_BYTES", 4096)
    if stored == torch.float8_e4m3fn and "Inf" in kind:
        pytest.skip("it has no infinity")
    weight = torch.randn(5, 6).double().expand(600, 5, 6).clone()
    # the largest numbers that are finite are no error
    weight[0, 0, 1], weight[0, 0, 2] = torch.finfo(stored).max, -torch.finfo(stored).max
    weight.view(-1)[place] = BAD[kind]
    if kind == "-NaN":
        weight.view(-1)[place] = torch.tensor(-4194304, dtype=torch.int32).view(torch.float32)
        assert weight.view(torch.int64).view(-1)[place] < 0
    weight = weight.to(stored)
    good = torch.nan_to_num(weight.double(), 0, 0, 0).to(stored)
    for number, tensor in enumerate((good, weight, weight.transpose(0, 2))):
        torch.save({"x.weight": tensor, "y.weight": good}, tmp_path / "model.pt")
        checkpoint = open_checkpoint(tmp_path / "model.pt")
        with torch.device("meta"):
            module = nn.ParameterDict({"x": torch.empty(tensor.shape), "y": torch.empty(600, 5, 6)})
        keys = KeyMap({"x.weight": "x", "y.weight": "y"})
        if number == 0:
            load_into(module, checkpoint, keys, device=device, dtype=torch.float64)
            continue
        expected = kind.strip("-")
        with pytest.raises(CheckpointError, match=f"tensor x.weight holds {expected};"):
            load_into(module, checkpoint, keys, device=device, dtype=torch.float64)
        assert stream.nonfinite_tensors(checkpoint) == {"x.weight": expected}
        with pytest.raises(CheckpointError, match=f"tensor x.weight holds {expected}"):
            checkpoint.read("x.weight")


def test_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cut short while in use"):
        load_into(empty(), checkpoint, KEYS, device="cpu", dtype=None, optional=["taps"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensors_through_both_staging_buffers(tmp_path: Path, dtype: torch.dtype) -> None:
    number = stream.STAGING_BYTES // 4 * 5 + 3
    tensors = {"weight": torch.arange(number, dtype=torch.int32).view(torch.float32)[None]}
    tensors["weight"] = torch.randn(1, number)
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.device("meta"):
        module = nn.Linear(number, 1, bias=False)
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    load_into(module, checkpoint, KeyMap({"weight": "weight"}), device="cuda", dtype=dtype)
    assert torch.equal(module.weight.cpu(), tensors["weight"].to(dtype))


@pytest.mark.parametrize("columns", [None, (1, 2)])
def test_a_staging_buffer_is_filled_only_after_it_was_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: tuple[int, int] | None
) -> None:
    """The order of a GPU's copies, on a CPU: an event stands between two uses of a buffer."""
    log: list[tuple[str, int]] = []
    buffers = [torch.empty(16, dtype=torch.uint8) for _ in range(2)]

    class Event:
        def __init__(self, turn: int) -> None:
            self.turn = turn

        def record(self, _: object) -> None:
            log.append(("sent", self.turn))

        def synchronize(self) -> None:
            log.append(("fetched", self.turn))

    read = stream.Copier._read

    def logged(
        self: stream.Copier, buffer: Tensor, file: FileTensor, begin: int
    ) -> list[Future[bool]]:
        log.append(("filled", [b.data_ptr() for b in buffers].index(buffer.data_ptr())))
        return read(self, buffer, file, begin)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(stream.Copier, "_read", logged)
    monkeypatch.setattr(stream, "STAGING_BYTES", 16)
    stored = torch.arange(18.0) if columns is None else torch.arange(36.0).view(9, 4)
    save_file({"x": stored}, tmp_path / "x.safetensors")
    source = open_checkpoint(tmp_path / "x.safetensors").entries["x"]
    if columns is not None:  # of each row, so many bytes as the whole of the other
        source, stored = source.cut(1, *columns), stored.narrow(1, *columns)
    with ThreadPoolExecutor(1) as pool:
        copier = stream.Copier(torch.device("cpu"), pool, [source])
        copier.staging = deque((buffers[turn], Event(turn)) for turn in (0, 1))  # type: ignore[misc]
        copier._fill_next()
        value = copier.fetch(source)
    assert not copier.scanned
    assert torch.equal(value, stored)
    # five pieces: each buffer is filled while the piece before is sent
    filling = [[("fetched", turn % 2), ("filled", turn % 2)] for turn in range(5)]
    sent = [[("sent", turn % 2)] for turn in range(5)]
    turns = [filling[0], *chain(*zip(filling[1:], sent[:-1], strict=True)), sent[-1]]
    assert log == [*chain(*turns)]
