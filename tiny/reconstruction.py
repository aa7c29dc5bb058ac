"""Training that the tiny tokenizers of both families share."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tiny import sizes
from tiny.clips import ClipPool, as_video, clip_batches
from tiny.run import Run
from worldline.losses import (
    ReconstructionObjective,
    Schedule,
    reconstruction_terms,
    total,
)
from worldline.shapes import VideoShape
from worldline.tokenizers.cosmos.model import CosmosTokenizer
from worldline.tokenizers.wan.model import WanTokenizer
from worldline.train.loop import Objective, generator

VideoTokenizer = CosmosTokenizer | WanTokenizer

# A continuous tokenizer is variational with one deviation for all latents: its noise sets what is
# worth a latent, so that fine detail does not become hard to predict noise.
DEVIATION = 0.1
KL = ReconstructionObjective(kl=Schedule((), (3e-4,)))
_PLACES = 1  # the stream that draws where a piece is cut: not that which chooses the clips
_SQUARED = 5.0  # weight of the squared error: few pixels, those of moving objects, have most of it


def train_reconstruction(
    run: Run,
    model: VideoTokenizer,
    objective: ReconstructionObjective,
    *,
    piece: VideoShape | None = None,
    compiled: bool = True,
    pool: ClipPool | None = None,
) -> int:
    """Train a float32 tokenizer to reconstruct clips; the number of steps done.

    They are those of `pool`, by default generated ones. Weights of the objective are constant.
    Clips are cut to `piece`, anywhere in their picture but at one place for a whole batch.
    --compile compiles the network as a whole if `compiled` is set.
    """
    batch, clips, device = run.batch or 48, run.clips or 24_000, run.device
    shape, config = sizes.SHAPE, model.config
    piece = piece or shape
    if pool is None:
        seeds = run.seeds(clips)
        drawn = clip_batches(seeds, shape, device, workers=run.workers)
        pool = ClipPool(drawn, len(seeds), shape)
    grid = piece.latent(config.temporal, config.spatial)
    latents = (batch, config.latent_channels, grid.frames, grid.height, grid.width)
    measure = run.compile(reconstruction_loss) if compiled else reconstruction_loss

    def draw(step: int) -> tuple[Tensor, Tensor]:
        draws = generator(run.seed, step, device, rank=run.ranks.rank)
        noise = torch.randn(latents, generator=draws, device=device)
        pictures = pool.batch(run.seed, step, batch, rank=run.ranks.rank)
        place = generator(run.seed, step, rank=run.ranks.rank, stream=_PLACES)
        return cut(pictures, piece, place), noise

    def loss(clips: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with run.mixed_precision():
            value, error = measure(model, objective, clips, noise)
        return value, {"psnr": -10 * error.log10()}

    return run.train(model, Objective(draw=draw, loss=loss), run.loop(12_000, 1.5e-3))


def cut(clips: Tensor, piece: VideoShape, draws: torch.Generator) -> Tensor:
    """First frames of clips (B, T, H, W, 3), cut to `piece` at one random place."""
    rooms = (clips.shape[2] - piece.height, clips.shape[3] - piece.width)
    y, x = (int(torch.randint(room + 1, (), generator=draws)) for room in rooms)
    return clips[:, : piece.frames, y : y + piece.height, x : x + piece.width]


def reconstruction_loss(
    model: VideoTokenizer, objective: ReconstructionObjective, clips: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of clips (B, T, H, W, 3), uint8, and the mean squared error in [0, 1].

    Noise is unit normal in the shape of the latents; a KL term in the objective uses it.
    """
    video, posterior = as_video(clips), None
    if objective.kl is None:
        reconstruction = model.reconstruct(video)
    else:
        latents = model.encode(video)
        posterior = (latents, torch.full_like(latents, 2 * math.log(DEVIATION)))
        reconstruction = model.decode(latents + DEVIATION * noise.to(latents.dtype))
    terms = reconstruction_terms(objective, video, reconstruction, 0, posterior=posterior)
    if posterior is not None:
        terms["squared"] = _SQUARED * (reconstruction.float() - video).square()
    error = (reconstruction.detach().float().clamp(-1, 1) - video).square().mean() / 4
    return total(terms), error


def statistics_videos(run: Run) -> Iterator[Tensor]:
    """Videos (B, 3, T, H, W) in [-1, 1] of which to measure the latents."""
    seeds = range(min(run.clips or 8192, 8192))
    for clips, _ in clip_batches(seeds, sizes.SHAPE, run.device, workers=run.workers):
        for part in clips.split(32):
            yield as_video(part).to(run.half)


@torch.no_grad()
def report_psnr(run: Run, done: int, model: VideoTokenizer) -> None:
    """Report the mean PSNR of held-out clips after encoding and decoding."""
    clips, _ = next(clip_batches(run.held_out(64, run.clips or 64), sizes.SHAPE, run.device))
    figures = []
    for clip in clips:
        video = as_video(clip[None])
        decoded = model.reconstruct(video.to(run.half)).float().clamp(-1, 1)
        figures.append(-10 * ((decoded - video).square().mean() / 4).log10())
    run.report({"steps": done, "psnr": float(torch.stack(figures).mean())})


class Moments:
    """Mean and deviation of latents, gathered a batch at a time."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._count = 0

    def add(self, z: Tensor) -> None:
        """Count in latents (B, C, t, h, w)."""
        z = z.double()  # float64: squares of many values are summed
        pair = torch.stack([z.mean((3, 4)), z.square().mean((3, 4))])  # (2, B, C, t)
        self._sums.append(pair.sum(1))
        self._count += len(z)

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of every channel and latent frame, (C, t), float64."""
        mean, square = torch.stack(self._sums).sum(0) / self._count
        return mean, (square - mean.square()).clamp_min(0).sqrt()
