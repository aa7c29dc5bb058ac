"""A part that waits in host memory gives what a resident one gives."""

import pytest
import torch
from torch import Tensor, nn

from worldline.parallel.offload import BlockPlan, Offloadable, StreamedModule

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
    part = StreamedModule(module, CPU, PLAN)
    for _ in range(2):
        with part.on_device() as streamed:
            for _ in range(3):  # a sampler calls it again and again
                assert torch.equal(streamed(x), expected)
            places = {block.work.weight.data_ptr() for block in streamed.blocks}  # type: ignore[union-attr]
            assert len(places) == min(depth, 2)
        for name, parameter in module.named_parameters():
            assert parameter.data_ptr() == home[name].data_ptr()
        assert torch.equal(module(x), expected)


def test_an_exception_ends_the_stream() -> None:
    module = Stack(3).requires_grad_(False)
    x = torch.randn(3, 8)
    expected = module(x)
    with pytest.raises(KeyboardInterrupt), StreamedModule(module, CPU, PLAN).on_device():
        raise KeyboardInterrupt
    assert torch.equal(module(x), expected)


def test_what_a_plan_counts() -> None:
    module = Stack(5, width=4)
    coming = 4 * 4 + 4  # `work` of a block
    whole = sum(parameter.numel() for parameter in module.parameters())
    assert PLAN.count(module) == whole - 3 * coming
    assert PLAN.count(Stack(1, width=4)) == 4 * 4 + 4 + 4 * 4 + 2 * coming


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
        part = StreamedModule(module, torch.device("cuda"), PLAN)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with part.on_device() as streamed:
            held = torch.cuda.memory_allocated() - before
            assert held <= 1.05 * 4 * PLAN.count(module)
            for _ in range(4):
                assert torch.allclose(streamed(x), expected, atol=1e-5)
        assert torch.cuda.memory_allocated() == before
        assert module.first.weight.device.type == "cpu"
