"""The noise that decides the draws of a clip, and the loop."""

import pytest
import torch
from torch import Tensor

from worldline.sampling.decode import CHUNK, decode, draw_noise

CPU = torch.device("cpu")


def noise(seeds: list[int], count: int, device: torch.device = CPU) -> Tensor:
    return torch.stack([one.clone() for one in draw_noise(seeds, 7, count, device)])


def test_a_clip_has_the_noise_that_it_has_alone() -> None:
    together = noise([3, 0, 3], CHUNK + 5)
    assert together.shape == (CHUNK + 5, 3, 7)
    for clip, seed in enumerate((3, 0, 3)):
        assert torch.equal(together[:, clip : clip + 1], noise([seed], CHUNK + 5))
    assert not torch.equal(together[:, 0], together[:, 1])


def test_a_longer_clip_begins_with_the_noise_of_a_shorter() -> None:
    assert torch.equal(noise([1], 2 * CHUNK)[:5], noise([1], 5))


def test_noise_is_exponential_with_mean_1() -> None:
    found = noise([0], 4000)
    assert (found > 0).all()
    assert float(found.mean()) == pytest.approx(1, abs=0.03)
    assert float((found > 1).float().mean()) == pytest.approx(0.3679, abs=0.02)


def test_noise_is_where_it_is_used() -> None:
    """Of devices that are neither a GPU of CUDA nor the CPU, too."""
    [found] = draw_noise([0], 7, 1, torch.device("meta"))
    assert found.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, CHUNK, 5 * CHUNK + 3])
def test_noise_on_a_gpu_is_that_of_the_cpu(count: int) -> None:
    """Two buffers take turns: none is filled again before its numbers have left."""
    gpu = torch.device("cuda")
    assert torch.equal(noise([3, 0], count, gpu).cpu(), noise([3, 0], count))


class Counter:
    """A decoder that keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float | None]] = []

    def start(self, prompt: Tensor, noise: Tensor | None) -> None:
        self.calls.append(("start", None if noise is None else float(noise)))

    def step(self, noise: Tensor | None) -> None:
        self.calls.append(("step", None if noise is None else float(noise)))

    @property
    def tokens(self) -> Tensor:
        raise NotImplementedError


def test_one_noise_a_token() -> None:
    """A second call goes on with the noise where the first left it."""
    decoder, numbers = Counter(), iter(torch.arange(5.0))
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    assert list(decode(decoder, prompt, 3, numbers)) == [1, 2, 3]
    assert list(decode(decoder, prompt, 2, numbers)) == [1, 2]
    names = ["start", "step", "step", "start", "step"]
    assert decoder.calls == list(zip(names, [0.0, 1.0, 2.0, 3.0, 4.0], strict=True))
    assert list(decode(decoder, prompt, 1, None)) == [1]
    assert decoder.calls[-1] == ("start", None)
