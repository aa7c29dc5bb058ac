"""Tokens one after another: from logits to a draw, the loop, its noise, and windows of long clips.

Source: nvidia-cosmos/cosmos-predict1 `autoregressive/utils/sampling.py` and
`autoregressive/diffusion_decoder/utils.py`; nucleus sampling from arXiv 1904.09751.
Axes: B batch, V vocabulary, C channels, T frames, H/W rows and columns.
"""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from worldline.finite import check_finite

CHUNK = 32  # tokens whose noise travels to a GPU together, and between two reports of progress


@dataclass(frozen=True)
class Sampling:
    """Rule by which a token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token and ignores the rest.
        top_p: the smallest set of likely tokens whose probability exceeds this stays; 1 keeps all.
        top_k: as many of the likeliest tokens stay; None keeps all. Not together with top_p < 1.
    """

    temperature: float = 1.0
    top_p: float = 0.8
    top_k: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def probabilities(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Filtered distribution: float32 probabilities (B, V), falling, and their token ids (B, V).

    A token that is filtered out has 0. Equal logits (B, V) keep the order of their ids.
    """
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    # float32: bf16 sums of 64,000 probabilities would end anywhere
    probs = (ordered.float() / sampling.temperature).softmax(-1)
    if sampling.top_k is not None:
        # equal to the k-th largest stays too, as in the reference
        kth = ordered[:, min(sampling.top_k, ordered.shape[1]) - 1, None]
        probs = probs.masked_fill(ordered < kth, 0)
    elif sampling.top_p < 1:
        # strict: the token that crosses the threshold stays, so at least one always does
        probs = probs.masked_fill(probs.cumsum(-1) - probs > sampling.top_p, 0)
    return probs / probs.sum(-1, keepdim=True), ids


def draw(logits: Tensor, sampling: Sampling, noise: Tensor | None = None) -> Tensor:
    """One token id (B,), int64, for each row of `logits` (B, V).

    Probability / noise is largest at a token with that token's probability: `noise` (B, V) is
    float32, exponential with mean 1. Unused when greedy.
    """
    if sampling.greedy:
        return logits.argmax(-1)
    assert noise is not None
    probs, ids = probabilities(logits, sampling)
    return ids.gather(-1, (probs / noise).argmax(-1, keepdim=True)).squeeze(-1)


class Decoder(Protocol):
    """The loop's view of a model; B clips advance together.

    Attributes:
        totals: (B,) sums of all logits so far: not finite if one was not.
        dtype: of the model.
    """

    totals: Tensor
    dtype: torch.dtype

    def start(self, prompt: Tensor, noise: Tensor | None) -> None:
        """Read the prompt (B, P) and draw the first token after it."""

    def step(self, noise: Tensor | None) -> None:
        """Read the token drawn last and draw the next."""

    @property
    def tokens(self) -> Tensor:
        """Prompt and all tokens drawn so far (B, P + count)."""


def decode(
    decoder: Decoder, prompt: Tensor, count: int, noise: Iterator[Tensor] | None
) -> Generator[int, None, Tensor]:
    """Continue `prompt` by `count` tokens; yield now and then how many are drawn, at last all.

    Args:
        decoder: the model and its rule of sampling.
        prompt: (B, P) ids, on the device of the model.
        count: tokens to draw for each clip, 1 or more.
        noise: one (B, V) tensor a token, on the device; None when the decoder is greedy.

    Returns:
        Prompt and drawn tokens (B, P + count).

    Raises:
        NonFiniteError: logits are; on a GPU found behind the chunk of their token.
    """
    previous: tuple[torch.cuda.Event, Tensor, int] | None = None
    device = prompt.device.type

    def check(totals: Tensor, done: int) -> None:
        check_finite(totals, f"token {done:,} of {count:,}: logits", decoder.dtype)

    for done in range(1, count + 1):
        numbers = None if noise is None else next(noise)
        if done == 1:
            decoder.start(prompt, numbers)
        else:
            decoder.step(numbers)
        if device == "cuda" and (done > 1 or count == 1):
            if done % CHUNK and done < count:
                continue
            # let the host run one chunk ahead, no more: the bar stays true and Ctrl-C is heard
            event, totals = torch.cuda.Event(), decoder.totals.to("cpu", non_blocking=True)
            event.record()
            current = event, totals, done
            waited, previous = current if done == count else previous, current
            if waited:
                waited[0].synchronize()
                check(*waited[1:])
        elif device == "cpu" or done == count:
            check(decoder.totals, done)
        yield done
    return decoder.tokens


def draw_noise(
    seeds: Sequence[int], vocabulary: int, count: int, device: torch.device
) -> Iterator[Tensor]:
    """Yield, for each token, exponential noise (B, V), float32 on `device`, with mean 1.

    Every clip has its own seed and CPU generator, so its draws depend neither on the device nor on
    the clips beside it. It is made in threads, a chunk ahead, for `count` tokens.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sizes = [min(CHUNK, count - at) for at in range(0, count, CHUNK)]
    # a thread a clip: 64,000 numbers take 1.4 ms, which GPUs that share a model do not wait for.
    # So others fill the rows where there are cores: to pass over a row takes 0.2 ms
    fillers = min(4 * len(seeds), torch.get_num_threads() - 1)
    fillers = fillers if fillers > 1 and _integers_take_as_many(vocabulary) else 0
    with (
        ThreadPoolExecutor(len(seeds) + 1, "noise") as threads,
        ThreadPoolExecutor(max(1, fillers), "rows") as rows,
    ):

        def make(size: int) -> Tensor:
            noise = torch.empty(size, len(seeds), vocabulary, pin_memory=device.type == "cuda")

            def fill(clip: int) -> None:
                generator, passed = generators[clip], torch.empty(vocabulary, dtype=torch.int64)
                filled: list[Future[None]] = []
                for row in noise[:, clip]:  # (V,); a larger call would draw otherwise
                    if fillers:
                        filled.append(rows.submit(_fill, row, generator.get_state()))
                        passed.random_(generator=generator)
                    else:
                        row.exponential_(1, generator=generator)
                for one in filled:
                    one.result()

            list(threads.map(fill, range(len(seeds))))
            return noise

        ahead = threads.submit(make, sizes[0])
        for following in (*sizes[1:], 0):
            noise = ahead.result()
            ahead = threads.submit(make, following)
            # torch keeps pinned memory until it is copied
            yield from noise.to(device, non_blocking=True)


def _fill(row: Tensor, state: Tensor) -> None:
    """Exponential noise of a generator in a given state."""
    generator = torch.Generator()
    generator.set_state(state)
    row.exponential_(1, generator=generator)


@cache
def _integers_take_as_many(count: int) -> bool:
    """Whether a generator is in one state after so many integers, or as many numbers of noise."""
    ours, theirs = (torch.Generator().manual_seed(0) for _ in range(2))
    torch.empty(count, dtype=torch.int64).random_(generator=ours)
    torch.empty(count).exponential_(1, generator=theirs)
    return torch.equal(ours.get_state(), theirs.get_state())


def split_windows(frames: Tensor, size: int, overlap: int) -> list[Tensor]:
    """Windows of `size` frames of (B, T, ...), overlapping; the last is filled by reflection.

    Windows begin every `size - overlap` frames while more than `overlap` frames remain.
    """
    windows = []
    for start in range(0, max(1, frames.shape[1] - overlap), size - overlap):
        window = frames[:, start : start + size]
        length = window.shape[1]
        order = np.pad(np.arange(length), (0, size - length), mode="reflect")
        windows.append(window[:, order.tolist()])
    return windows


def blend_windows(windows: Sequence[Tensor], overlap: int) -> Tensor:
    """Join (B, C, T, H, W) windows; each overlap fades linearly from the earlier to the later.

    The weights of the later window run from 0 to 1, both ends included, so an overlap of one frame
    takes the earlier window's.
    """
    joined = windows[0]
    for window in windows[1:]:
        weight = torch.linspace(0, 1, overlap, device=window.device, dtype=window.dtype)
        weight = weight.view(1, 1, -1, 1, 1)
        before = joined.shape[2] - overlap
        seam = joined[:, :, before:] * (1 - weight) + window[:, :, :overlap] * weight
        joined = torch.cat([joined[:, :, :before], seam, window[:, :, overlap:]], dim=2)
    return joined
