"""Filters by their definitions, draws by their frequencies, noise, the loop, and windows."""

import pytest
import torch
from torch import Tensor

from worldline.sampling.solvers import finish
from worldline.sampling.tokens import (
    CHUNK,
    Sampling,
    blend_windows,
    decode,
    draw,
    draw_noise,
    probabilities,
    split_windows,
)


def test_top_p_keeps_the_token_that_crosses_the_threshold() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.25, 0.15]]).log()
    probs, ids = probabilities(logits, Sampling(top_p=0.7))
    assert ids.tolist() == [[1, 2, 3, 0]]
    assert torch.allclose(probs, torch.tensor([[2 / 3, 1 / 3, 0, 0]]))
    # exactly at the threshold the next one still stays: the test is strict
    probs, _ = probabilities(torch.tensor([[0.5, 0.25, 0.25]]).log(), Sampling(top_p=0.5))
    assert probs[0, 1] > 0


def test_a_tiny_top_p_leaves_one_token() -> None:
    logits = torch.randn(5, 100)
    probs, ids = probabilities(logits, Sampling(top_p=1e-6))
    assert torch.equal(ids[:, 0], logits.argmax(-1))
    assert torch.equal(probs[:, 0], torch.ones(5))


def test_top_k_and_no_filter() -> None:
    logits = torch.randn(3, 50)
    probs, _ = probabilities(logits, Sampling(top_p=1.0, top_k=7))
    assert (probs > 0).sum(-1).tolist() == [7, 7, 7]
    probs, ids = probabilities(logits, Sampling(top_p=1.0, temperature=2.0))
    assert torch.allclose(probs, (logits / 2).softmax(-1).gather(1, ids))


def test_draws_have_the_filtered_frequencies() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[None]
    generator = torch.Generator().manual_seed(0)
    noise = torch.empty(20_000, 4).exponential_(1, generator=generator)
    drawn = draw(logits.expand(20_000, 4), Sampling(top_p=0.85), noise)
    share = torch.bincount(drawn, minlength=4) / 20_000
    assert torch.allclose(share, torch.tensor([4 / 9, 3 / 9, 2 / 9, 0.0]), atol=0.015)


def test_greedy_takes_the_best_and_needs_no_noise() -> None:
    logits = torch.randn(4, 30)
    assert torch.equal(draw(logits, Sampling(temperature=0)), logits.argmax(-1))


def test_bf16_logits_are_filtered_in_float32() -> None:
    logits = torch.randn(1, 5000).bfloat16()
    probs, _ = probabilities(logits, Sampling())
    assert probs.dtype == torch.float32
    assert torch.equal(probs, probabilities(logits.float(), Sampling())[0])


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


@pytest.mark.parametrize("vocabulary", [7, 64, 1001])
def test_rows_filled_by_several_threads_are_the_same(
    monkeypatch: pytest.MonkeyPatch, vocabulary: int
) -> None:
    drawn = []
    for cores in (1, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda cores=cores: cores)
        drawn.append(torch.stack([*draw_noise([3, 4], vocabulary, CHUNK + 5, CPU)]))
    generator = torch.Generator().manual_seed(4)
    assert torch.equal(drawn[0], drawn[1])
    for row in drawn[1][:, 1]:
        assert torch.equal(row, torch.empty(vocabulary).exponential_(1, generator=generator))


def test_noise_is_exponential_with_mean_1() -> None:
    found = noise([0], 4000)
    assert (found > 0).all()
    assert float(found.mean()) == pytest.approx(1, abs=0.03)
    assert float((found > 1).float().mean()) == pytest.approx(0.3679, abs=0.02)


def test_noise_is_where_it_is_used() -> None:
    """Also on devices that are neither a GPU of CUDA nor the CPU."""
    [found] = draw_noise([0], 7, 1, torch.device("meta"))
    assert found.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, CHUNK, 5 * CHUNK + 3])
def test_noise_on_a_gpu_is_that_of_the_cpu(count: int) -> None:
    """Two buffers take turns: none is filled again before its numbers have left."""
    gpu = torch.device("cuda")
    assert torch.equal(noise([3, 0], count, gpu).cpu(), noise([3, 0], count))


class Counter:
    """A decoder that keeps its calls."""

    totals, dtype = torch.zeros(1), torch.float32

    def __init__(self) -> None:
        self.calls: list[tuple[str, float | None]] = []

    def start(self, prompt: Tensor, noise: Tensor | None) -> None:
        self.calls.append(("start", None if noise is None else float(noise)))

    def step(self, noise: Tensor | None) -> None:
        self.calls.append(("step", None if noise is None else float(noise)))

    @property
    def tokens(self) -> Tensor:
        return torch.tensor([[len(self.calls)]])


def test_one_noise_a_token() -> None:
    """A second call goes on with the noise where the first left it."""
    decoder, numbers = Counter(), iter(torch.arange(5.0))
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    assert list(decode(decoder, prompt, 3, numbers)) == [1, 2, 3]
    assert list(decode(decoder, prompt, 2, numbers)) == [1, 2]
    names = ["start", "step", "step", "start", "step"]
    assert decoder.calls == list(zip(names, [0.0, 1.0, 2.0, 3.0, 4.0], strict=True))
    assert finish(decode(decoder, prompt, 1, None)).tolist() == [[6]]
    assert decoder.calls[-1] == ("start", None)


@pytest.mark.parametrize("length", [1, 2, 5, 8, 9, 14, 16, 20])
@pytest.mark.parametrize(("size", "overlap"), [(8, 2), (6, 1), (4, 0)])
def test_windows_cover_the_clip(length: int, size: int, overlap: int) -> None:
    frames = torch.arange(length).view(1, -1, 1, 1)
    windows = split_windows(frames, size, overlap)
    assert all(window.shape == (1, size, 1, 1) for window in windows)
    assert set(torch.cat(windows, 1).flatten().tolist()) == set(range(length))
    for number, window in enumerate(windows):
        start = number * (size - overlap)
        true = frames[:, start : start + size]
        assert torch.equal(window[:, : true.shape[1]], true)


def test_a_short_window_is_filled_by_reflection() -> None:
    [window] = split_windows(torch.arange(5).view(1, -1), 8, 2)
    assert window.tolist() == [[0, 1, 2, 3, 4, 3, 2, 1]]
    [window] = split_windows(torch.zeros(1, 1), 3, 2)
    assert window.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("overlap", [0, 1, 2, 3])
def test_windows_of_one_clip_give_it_back(overlap: int) -> None:
    clip = torch.randn(1, 3, 14, 2, 2)
    windows = [clip[:, :, at : at + 5] for at in range(0, 14 - overlap, 5 - overlap)]
    joined = blend_windows(windows, overlap)
    assert torch.allclose(joined, clip[:, :, : joined.shape[2]], atol=1e-6)
    assert joined.shape[2] == 14
