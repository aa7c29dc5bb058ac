"""A part that waits in host memory gives what a resident one gives."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.offloading import streamed
from worldline.parallel.offload import BlockPlan, Offloadable, _BlockStream
from worldline.parallel.pinned import pin

CPU = torch.device("cpu")
PLAN = BlockPlan("blocks", kept=("kept.weight",))


def test_on_the_cpu_there_is_nothing_to_move() -> None:
    part = Offloadable(nn.Linear(3, 3), torch.device("cpu"), offload=True)
    assert not part.offload
    with part.on_device() as module:
        assert module is part.module


@pytest.mark.gpu
def test_weights_visit_the_device_and_leave_it() -> None:
    torch.manual_seed(0)
    module = nn.Linear(1024, 1024).requires_grad_(False)
    x = torch.randn(4, 1024)
    expected = module(x)
    part = Offloadable(module, torch.device("cuda"), offload=True)
    with part.on_device() as visiting:
        visiting(x.cuda())  # the matrix library takes its workspace now, and keeps it
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        with part.on_device() as visiting:
            assert visiting.weight.device.type == "cuda"
            assert torch.allclose(visiting(x.cuda()).cpu(), expected, atol=1e-4)
        assert module.weight.device.type == "cpu"
        assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_an_exception_brings_the_weights_home() -> None:
    part = Offloadable(nn.Linear(3, 3).requires_grad_(False), torch.device("cuda"), offload=True)
    with pytest.raises(KeyboardInterrupt), part.on_device():
        raise KeyboardInterrupt
    assert part.module.weight.device.type == "cpu"


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.work = nn.Linear(width, width)
        self.kept = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.work(x).tanh()


class Stack(nn.Module):
    """Blocks in order; `kept` of each is used before any is called."""

    def __init__(self, depth: int, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block.kept(x)  # type: ignore[operator]
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_streamed_blocks_give_what_resident_ones_give(depth: int) -> None:
    module = Stack(depth).requires_grad_(False)
    home = {name: parameter.data for name, parameter in module.named_parameters()}
    x = torch.randn(3, 8)
    expected = module(x)
    part = streamed(module, PLAN)
    assert part.streamed
    places: set[int] = set()
    for block in module.blocks:
        block.register_forward_hook(lambda block, *_: places.add(block.work.weight.data_ptr()))
    for _ in range(2):
        places.clear()
        with part.on_device() as there:
            for _ in range(3):  # a sampler calls it again and again
                assert torch.equal(there(x), expected)
            assert len(places) == min(depth, 2)
            assert places.isdisjoint(weight.data_ptr() for weight in home.values())
        for name, parameter in module.named_parameters():
            assert parameter.data_ptr() == home[name].data_ptr()
        assert torch.equal(module(x), expected)


@pytest.mark.parametrize(
    ("tokens", "room", "whole"),
    [(15_999, True, True), (15_999, False, False), (16_000, True, False), (None, True, False)],
)
def test_short_work_moves_the_whole_module_where_there_is_room(
    tokens: int | None, room: bool, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks would wait for their copies: 16,000 tokens take as long as one."""
    module, x = Stack(3).requires_grad_(False), torch.randn(3, 8)
    expected = module(x)
    part = streamed(module, PLAN)
    monkeypatch.setattr(part, "_has_room", lambda: room)
    for _ in range(2):
        with part.on_device(tokens) as there:
            assert torch.equal(there(x), expected)
            assert part.streamed is not whole
            assert any(block._forward_pre_hooks for block in module.blocks) is not whole
    with part.on_device():
        assert part.streamed


@pytest.mark.parametrize("early", [True, False])
def test_an_exception_in_the_middle_of_a_forward(
    early: bool,
) -> None:
    """The next forward is right, though another block was to come; so is what lies at home."""
    module = Stack(4).requires_grad_(False)
    home = {name: parameter.data for name, parameter in module.named_parameters()}
    x = torch.randn(3, 8)
    expected = module(x)
    part = streamed(module, PLAN)
    part.pinned = early

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with part.on_device() as there:
        for number in (2, 0, 3):
            handle = there.blocks[number].work.register_forward_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                there(x)
            handle.remove()
            assert torch.equal(there(x), expected)
    module.blocks[1].work.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt), part.on_device() as there:
        there(x)
    for name, parameter in module.named_parameters():
        assert parameter.data_ptr() == home[name].data_ptr()
    assert not any(block._forward_pre_hooks for block in module.blocks)


class Device:
    """A device whose streams run at once or never, as far as nothing makes them wait.

    What is done on a stream knows of all that was done before it there, and of what the stream has
    waited for. Two uses of the same memory of which neither knows of the other are a race.

    Attributes:
        log: for each use of memory its name, its address, and all that is known to be done.
    """

    def __init__(self) -> None:
        self.compute = Stream()
        self.current = self.compute
        self.log: list[tuple[str, int, frozenset[int]]] = []

    def Stream(self, device: torch.device) -> Stream:
        return Stream()

    def Event(self) -> Event:
        return Event()

    def current_stream(self, device: torch.device) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def use(self, name: str, address: int) -> None:
        self.log.append((name, address, frozenset(self.current.done)))
        self.current.done.add(len(self.log) - 1)

    def races(self) -> Iterator[tuple[str, str]]:
        for number, (name, address, known) in enumerate(self.log):
            for earlier, (other, same, _) in enumerate(self.log[:number]):
                if same == address and earlier not in known and "copy" in name + other:
                    yield other, name


class Stream:
    def __init__(self) -> None:
        self.done: set[int] = set()

    def wait_stream(self, other: Stream) -> None:
        self.done |= other.done

    def wait_event(self, event: Event) -> None:
        self.done |= event.done


class Event:
    def __init__(self) -> None:
        self.done: set[int] = set()

    def record(self, stream: Stream) -> None:
        self.done = set(stream.done)


class TracedBlocks(_BlockStream):
    def bring(self, name: str, home: Tensor, room: Tensor) -> Tensor:
        if name == "work.weight":
            number = next(n for n, block in enumerate(self.home) if block[name] is home)
            self.gpu.use(f"copy {number}", room.data_ptr())
        return super().bring(name, home, room)


def traced(
    module: Stack, early: bool, drive: Callable[[Stack, Device], None], kind: Any = TracedBlocks
) -> Device:
    """A device on which `drive` has used the blocks of a module."""
    device = Device()
    blocks = PLAN.split(module)
    for number, block in enumerate(module.blocks):

        def compute(work: nn.Module, _: Any, number: int = number) -> None:
            device.use(f"compute {number}", work.weight.data_ptr())  # type: ignore[arg-type, operator, union-attr]

        block.work.register_forward_pre_hook(compute)  # type: ignore[union-attr]
    stream = kind(blocks, CPU, device, early=early)
    with stream.hooks(module.blocks.children()):
        drive(module, device)
    return device


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_nothing_is_overwritten_before_it_was_used(depth: int, early: bool) -> None:
    """Whatever runs first: copies wait for the work on their slot, and work for its copy."""
    module = Stack(depth).requires_grad_(False)
    x = torch.randn(3, 8)
    expected = module(x)

    def forwards(module: Stack, device: Device) -> None:
        for _ in range(3):
            assert torch.equal(module(x), expected)

    device = traced(module, early, forwards)
    assert [*device.races()] == []
    names = [name for name, _, _ in device.log]
    computed = [name for name in names if name.startswith("compute")]
    assert computed == [f"compute {number}" for number in range(depth)] * 3
    copied = [name for name in names if name.startswith("copy")]
    if depth <= 2:
        assert len(copied) == depth  # they stay
        return
    # in order, around the end, and one ahead of what computes
    assert copied == [f"copy {number % depth}" for number in range(3 * depth + 1)]
    for number, name in enumerate(computed):
        ahead = names.index(f"copy {(number + 1) % depth}") if number < depth else None
        if early and ahead is not None:
            assert ahead < names.index(name)


@pytest.mark.parametrize("early", [True, False])
def test_no_race_behind_an_exception(early: bool) -> None:
    module = Stack(5).requires_grad_(False)
    x = torch.randn(3, 8)
    expected = module(x)

    def forwards(module: Stack, device: Device) -> None:
        for number in (0, 3, 4, 1):

            def fail(*_: object) -> None:
                raise KeyboardInterrupt

            handle = module.blocks[number].work.register_forward_hook(fail)  # type: ignore[union-attr]
            with pytest.raises(KeyboardInterrupt):
                module(x)
            handle.remove()
            assert torch.equal(module(x), expected)

    assert [*traced(module, early, forwards).races()] == []


@pytest.mark.parametrize("lost", ["used", "arrived"])
def test_a_forgotten_event_is_a_race(lost: str) -> None:
    """The device of these tests would see it."""

    class Forgetful(TracedBlocks):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            events = [SimpleNamespace(done=set(), record=lambda stream: None) for _ in self.slots]
            setattr(self, lost, events)

    module = Stack(5).requires_grad_(False)
    assert [*traced(module, True, lambda module, _: module(torch.ones(1, 8)), Forgetful).races()]


def sizes_of(module: nn.Module) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in module.named_parameters()}


def test_what_a_plan_counts() -> None:
    module = Stack(5, width=4)
    coming = 4 * 4 + 4  # `work` of a block
    whole = sum(parameter.numel() for parameter in module.parameters())
    assert PLAN.count(sizes_of(module)) == whole - 3 * coming
    assert PLAN.count(sizes_of(Stack(1, width=4))) == 4 * 4 + 4 + 4 * 4 + 2 * coming
    inside = {f"model.{name}": size for name, size in sizes_of(module).items()}
    assert PLAN.count({**inside, "other.myblocks.7.x": 100}) == whole - 3 * coming + 100


class Driver:
    """Pins as `torch.cuda.cudart()` does, or fails to."""

    cudaError = SimpleNamespace(success=0)

    def __init__(self, error: int) -> None:
        self.error = error
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert address % mmap.PAGESIZE == 0
        if not self.error:
            self.pinned[address] = nbytes
        return self.error

    def cudaHostUnregister(self, address: int) -> None:
        del self.pinned[address]


@pytest.mark.parametrize("error", [0, 1])
def test_pinned_where_they_lie(
    error: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For as long as the owner lives; where nothing can be pinned, that is noted."""
    driver, owner = Driver(error), nn.Module()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.inference_mode(False))

    def exhausted(_: Tensor) -> Tensor:
        raise RuntimeError

    monkeypatch.setattr(Tensor, "pin_memory", exhausted)
    paged = torch.frombuffer(mmap.mmap(-1, 8192), dtype=torch.float32)
    weights = [nn.Parameter(paged), nn.Parameter(torch.randn(2050)[1:])]
    before = [weight.detach().clone() for weight in weights]
    assert pin(weights, CPU, owner) is not error
    assert weights[0].data_ptr() == paged.data_ptr()
    assert all(map(torch.equal, weights, before))
    if error:
        assert "0.0 GB" in caplog.text
    else:
        assert driver.pinned == {weight.data_ptr(): weight.nbytes for weight in weights}
        assert not caplog.text
    del owner
    assert not driver.pinned


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [4, 5])
def test_streaming_to_a_gpu(depth: int) -> None:
    """Blocks that compute longer than they travel, and the reverse: each sees its own weights."""
    for rows in (1, 8192):
        module = Stack(depth, width=2048).requires_grad_(False)
        x = torch.randn(rows, 2048, device="cuda")
        resident = Stack(depth, width=2048).requires_grad_(False)
        resident.load_state_dict(module.state_dict())
        expected = resident.cuda()(x)
        del resident
        part = Offloadable(module, torch.device("cuda"), offload=True, blocks=PLAN)
        assert part.pinned
        assert all(block.work.weight.is_pinned() for block in module.blocks)  # type: ignore[operator, union-attr]
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with part.on_device() as there:
            held = torch.cuda.memory_allocated() - before
            assert held <= 1.05 * 4 * PLAN.count(sizes_of(module))
            for _ in range(4):
                assert torch.equal(there(x), expected)
            # beside the weights the input, the stream, and what one block makes of it
            most = 4 * PLAN.count(sizes_of(module)) + 6 * x.nbytes
            assert torch.cuda.max_memory_allocated() - before <= 1.05 * most
        assert torch.cuda.memory_allocated() == before
        assert module.first.weight.device.type == "cpu"
        del part, there
        assert not any(block.work.weight.is_pinned() for block in module.blocks)  # type: ignore[operator, union-attr]
