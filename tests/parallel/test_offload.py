"""A part that waits in host memory gives what a resident one gives."""

import pytest
import torch
from torch import nn

from worldline.parallel.offload import Part


def test_on_the_cpu_there_is_nothing_to_move() -> None:
    part = Part(nn.Linear(3, 3), torch.device("cpu"), offload=True)
    assert not part.offload
    with part.on_device() as module:
        assert module is part.module


@pytest.mark.gpu
def test_weights_visit_the_device_and_leave_it() -> None:
    torch.manual_seed(0)
    module = nn.Linear(1024, 1024).requires_grad_(False)
    x = torch.randn(4, 1024)
    expected = module(x)
    part = Part(module, torch.device("cuda"), offload=True)
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
    part = Part(nn.Linear(3, 3).requires_grad_(False), torch.device("cuda"), offload=True)
    with pytest.raises(KeyboardInterrupt), part.on_device():
        raise KeyboardInterrupt
    assert part.module.weight.device.type == "cpu"
