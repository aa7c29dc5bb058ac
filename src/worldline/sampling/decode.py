"""Drawing tokens one after another: the loop, and the noise that decides the draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

CHUNK = 32  # tokens whose noise travels to a GPU together; also how often progress is told there


class Decoder(Protocol):
    """What the loop needs of a model; B clips go in step."""

    def start(self, prompt: Tensor, noise: Tensor | None) -> None:
        """Read the prompt (B, P) and draw the first token after it."""

    def step(self, noise: Tensor | None) -> None:
        """Read the token drawn last and draw the next."""

    @property
    def tokens(self) -> Tensor:
        """Prompt and all tokens drawn so far (B, P + count)."""


def decode(
    decoder: Decoder, prompt: Tensor, count: int, noise: Iterator[Tensor] | None
) -> Iterator[int]:
    """Continue `prompt` by `count` tokens; yield now and then how many are done, at last all.

    Args:
        decoder: the model and its rule of sampling; its `tokens` are the result.
        prompt: (B, P) ids, on the device of the model.
        count: tokens to draw for each clip, 1 or more.
        noise: one (B, V) tensor a token, on the device; None when the decoder is greedy.
    """
    told: torch.cuda.Event | None = None
    for index in range(count):
        draw = None if noise is None else next(noise)
        if index == 0:
            decoder.start(prompt, draw)
        else:
            decoder.step(draw)
        at_end = index + 1 == count
        if prompt.device.type != "cuda" or index == 0:
            yield index + 1
        elif (index + 1) % CHUNK == 0 or at_end:
            # let the host run one chunk ahead, no more: the bar stays true and Ctrl-C is heard
            event = torch.cuda.Event()
            event.record()
            if told is not None:
                told.synchronize()
            if at_end:
                event.synchronize()
            told = event
            yield index + 1


def draw_noise(
    seeds: Sequence[int], vocabulary: int, count: int, device: torch.device
) -> Iterator[Tensor]:
    """Yield, for each token, exponential noise (B, V), float32 on `device`, with mean 1.

    Every clip has its own CPU generator, so its draws depend neither on the device nor on the
    clips beside it. A GPU's noise is made and sent in a thread, ahead of its use.

    Args:
        seeds: one a clip.
        vocabulary: V.
        count: how many tokens will be drawn.
        device: where the noise is used.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def fill(rows: Tensor, generator: torch.Generator) -> None:
        for row in rows:  # (V,); one call a clip and token: a larger call would draw otherwise
            row.exponential_(1, generator=generator)

    if device.type != "cuda":
        for _ in range(count):
            noise = torch.empty(1, len(seeds), vocabulary)
            for clip, generator in enumerate(generators):
                fill(noise[:, clip], generator)
            yield noise[0].to(device)
        return
    sizes = [min(CHUNK, count - at) for at in range(0, count, CHUNK)]
    with torch.inference_mode(False):  # a mode of the caller's thread; others fill them
        buffers = [torch.empty(CHUNK, len(seeds), vocabulary, pin_memory=True) for _ in range(2)]
    sent: list[torch.cuda.Event | None] = [None, None]

    def fill_free(number: int, clip: int) -> None:
        event = sent[number % 2]
        if event is not None:
            event.synchronize()  # the buffer's last content is on the device
        fill(buffers[number % 2][: sizes[number], clip], generators[clip])

    # a thread a clip: 64,000 numbers take 1.4 ms, and a step of several clips not much longer
    with ThreadPoolExecutor(len(seeds), "noise") as threads:

        def begin(number: int) -> list[Future[None]]:
            return [threads.submit(fill_free, number, clip) for clip in range(len(seeds))]

        ahead = begin(0)
        for number, size in enumerate(sizes):
            for part in ahead:
                part.result()
            chunk = buffers[number % 2][:size].to(device, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            sent[number % 2] = event
            if number + 1 < len(sizes):
                ahead = begin(number + 1)
            yield from chunk
