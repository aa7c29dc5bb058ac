"""Tokens -> latents by diffusion -> video: the diffusion decoder of the autoregressive worlds.

Source: nvidia-cosmos/cosmos-predict1 `autoregressive/diffusion_decoder/{inference,model,utils}.py`;
NVIDIA/Cosmos, the same below `cosmos1/models/autoregressive/diffusion_decoder/`.
Axes: B batch, C channels, T/H/W latent grid, h/w rows and columns of tokens, S rows of a text.

A clip is decoded window by window, 8 latent frames (57 frames) at once, of which 2 are shared with
the window before. Each window starts from the same noise, that of the seed, as in Cosmos 1.0
(Predict1 goes on with one global generator, which cannot be repeated), so that a window depends on
its tokens alone.

The seam: latent frame 0 of a window decodes to one frame and each other one to eight, so two shared
latent frames are the last frames of the earlier window and the first nine of the later one. These
nine are dropped, and time runs on evenly. The released code blends two frames in their place,
wherefore time jumps back by seven frames at every seam; that is `seam="as_released"`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worldline.choices import SEAMS, Seam
from worldline.loading import DecoderParts
from worldline.models.predict1_dit.model import DECODER_WINDOW, DiT, Positions
from worldline.nn.dit import Context
from worldline.nn.pieces import decode_stream
from worldline.pipelines.diffusion import rounded
from worldline.pipelines.exchange import shown_pieces
from worldline.sampling.edm import SIGMA_DATA, make_sigmas, sample
from worldline.sampling.noise import standard_noise
from worldline.sampling.windows import blend_windows, split_windows
from worldline.shapes import LatentShape
from worldline.tokenizers.cosmos.model import CosmosTokenizer, LatentStatistics

OVERLAP = 2  # latent frames that a window shares with the one before
GUIDANCE = 1.8
NUM_STEPS = 15
SIGMA_MIN = 0.02
FPS = 24.0  # of the motion as the network is told it, whatever the rate of the file


@dataclass(frozen=True, kw_only=True)
class DecoderSettings:
    """How tokens are decoded; the defaults are those of the released pipelines.

    Attributes:
        sampler: see `worldline.sampling.edm.sample`.
        num_steps: evaluations of a window.
        guidance: how far to go from no prompt and no tokens towards both, and beyond.
        seed: of the noise.
        seam: how windows are joined; "as_released" repeats a fault of the released code.
        rotary_precision: of the angles of position; None is that of the weights, as the released
            pipelines have it: bf16 on a GPU.
    """

    sampler: str
    num_steps: int = NUM_STEPS
    guidance: float = GUIDANCE
    seed: int = 0
    seam: Seam = "corrected"
    rotary_precision: str | None = None

    def __post_init__(self) -> None:
        if self.seam not in SEAMS:
            raise ValueError(f"seam is {self.seam!r}; it must be one of {', '.join(SEAMS)}")

    def count_steps(self, windows: int) -> int:
        """Return how often `on_step` of `denoise_windows` is called."""
        return windows * (len(make_sigmas(self.sampler, self.num_steps)) - 1)


class _Branches(NamedTuple):
    """What the network is shown beside the latents; row 0 with the prompt, row 1 without."""

    context: Context
    ids: Tensor
    positions: Positions


class _Paired:
    """The network with both branches of the guidance in one batch.

    The sampler asks for the branch with the prompt, then for the other with the same latents: the
    second answer is ready by then.
    """

    def __init__(self, model: DiT, branches: _Branches) -> None:
        self.model = model
        self.branches = branches
        self._other: Tensor | None = None

    def __call__(self, x: Tensor, times: Tensor, conditional: bool) -> Tensor:
        if not conditional:
            assert self._other is not None, "the branch with the prompt comes first"
            other, self._other = self._other, None
            return other
        context, ids, positions = self.branches
        y = self.model(x.repeat(2, 1, 1, 1, 1), times.repeat(2), context, positions, ids=ids)
        wanted, self._other = y.chunk(2)
        return wanted


def cut_windows(tokens: Tensor) -> list[Tensor]:
    """Return the windows (1, 8, h, w) of ids (1, T, h, w); the last is filled by reflection."""
    return split_windows(tokens, DECODER_WINDOW, OVERLAP)


@torch.inference_mode()
def denoise_windows(
    model: DiT,
    tokens: Tensor,
    context: Tensor,
    settings: DecoderSettings,
    *,
    finer: int = 2,
    noise: list[Tensor] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Return the latents of every window, float32 (1, C, 8, H, W), normalised.

    Args:
        model: on its device.
        tokens: ids (1, T, h, w), any integer dtype, any T of 1 or more.
        context: embedding of the prompt (1, S, E).
        settings: how.
        finer: latent cells a token is wide and high.
        noise: unit normal, one for each window; None draws it from the seed.
        on_step: called after each step with how many were made.
    """
    _, _, height, width = tokens.shape
    grid = LatentShape(DECODER_WINDOW, height * finer, width * finer)
    device = model.embed.weight.device
    shape = (1, model.config.latent_channels, grid.frames, grid.height, grid.width)
    precision = settings.rotary_precision
    angles = model.dtype if precision is None else getattr(torch, precision)
    positions = model.make_positions(grid, FPS, rotary_dtype=angles)
    text = context.to(device, model.dtype)
    encoded = model.encode_context(torch.cat([text, torch.zeros_like(text)]))
    latents = []
    done = 0

    def count(*_: object) -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(done)

    for number, window in enumerate(cut_windows(tokens.to(device))):
        # without the prompt there are no tokens either: all ids 0, which is a token too
        ids = model.encode_ids(torch.cat([window, torch.zeros_like(window)]), grid)
        start = standard_noise(settings.seed, shape) if noise is None else noise[number]
        latents.append(
            sample(
                _Paired(model, _Branches(encoded, ids, positions)),
                start.to(device),
                sampler=settings.sampler,
                num_steps=settings.num_steps,
                guidance=settings.guidance,
                on_step=count,
                sigma_min=SIGMA_MIN,
            )
        )
    return latents


def decode_windows(
    tokenizer: CosmosTokenizer,
    statistics: LatentStatistics,
    latents: list[Tensor],
    frames: int,
    seam: Seam = "corrected",
    *,
    first: int = 0,
) -> Iterator[Tensor]:
    """Yield the video of `denoise_windows`, (1, 3, T, H, W) in about [-1, 1], piece by piece.

    Args:
        tokenizer: on its device.
        statistics: of its latents.
        latents: of every window, or of a few in order, whose part of the video it is then.
        frames: latent frames of the clip.
        seam: how windows are joined; "as_released" needs all of them.
        first: number of the first of these windows.
    """
    temporal = tokenizer.config.temporal
    whole = 1 + (frames - 1) * temporal
    restored = (statistics.denormalise(window / SIGMA_DATA) for window in latents)
    if seam == "as_released" and len(latents) > 1:
        pieces = [torch.cat(list(decode_stream(tokenizer, one)), dim=2) for one in restored]
        # float32: a fade of few levels; clamped before it, as released
        blended = blend_windows([piece.float().clamp(-1, 1) for piece in pieces], OVERLAP)
        yield blended[:, :, :whole]
        return
    for number, window in enumerate(restored, start=first):
        begun = number * (DECODER_WINDOW - OVERLAP)
        skip = 1 + (OVERLAP - 1) * temporal if number else 0  # frames of the window before
        # what follows changes nothing before it, so what reflection filled in is not decoded
        for piece in decode_stream(tokenizer, window[:, :, : frames - begun]):
            left = piece[:, :, skip:]
            skip = max(0, skip - piece.shape[2])
            if left.shape[2]:
                yield left


def decode_frames(
    parts: DecoderParts, latents: list[Tensor], frames: int, seam: Seam, *, first: int = 0
) -> Iterator[NDArray[np.uint8]]:
    """Yield the frames of a video, uint8 (T, H, W, 3), piece by piece, as `decode_windows`."""
    with parts.tokenizer.on_device() as tokenizer:
        weight = tokenizer.quant_conv.weight
        # statistics as the released pipelines use them: in the dtype of the tokenizer
        statistics = rounded(parts.statistics, weight.dtype)
        yield from shown_pieces(
            decode_windows(tokenizer, statistics, latents, frames, seam, first=first)
        )
