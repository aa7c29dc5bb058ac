"""What the small tokenizers share in training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tiny import sizes
from tiny.data import ClipPool, as_video, physics_batches
from tiny.run import Run, half_precision, mixed_precision
from worldline.shapes import VideoShape
from worldline.tokenizers.cosmos.model import CosmosTokenizer
from worldline.tokenizers.wan.model import WanTokenizer
from worldline.train.loop import LoopConfig, Objective, generator
from worldline.train.losses import (
    FeatureNetwork,
    ReconstructionObjective,
    Schedule,
    reconstruction_terms,
    total,
)

VideoTokenizer = CosmosTokenizer | WanTokenizer

# A continuous tokenizer is variational with one deviation for all latents: its noise sets what is
# worth a latent, so that fine detail does not become hard to predict noise.
DEVIATION = 0.1
KL = Schedule.constant(3e-4)
_PLACES = 1  # the stream that says where a piece is cut: not that which chooses the clips
_SQUARED = 5.0  # of its squared error: few pixels, those of moving objects, have most of it


def train_reconstruction(
    run: Run,
    model: VideoTokenizer,
    objective: ReconstructionObjective,
    features: FeatureNetwork | None = None,
    *,
    piece: VideoShape | None = None,
    whole: bool = True,
) -> int:
    """Train a tokenizer to give back generated clips; return the number of steps done.

    Args:
        run: how.
        model: float32, with gradients.
        objective: with weights that are constant, so that any iteration has the same; one with a
            KL term makes latents that bear noise.
        features: for the perceptual term, if the objective has one.
        piece: what is cut of a clip, anywhere in its picture; the same place for a whole batch.
            None is all of it.
        whole: the network is compiled as a whole where the run asks for it.
    """
    batch, clips, device = run.batch or 48, run.clips or 24_000, run.device
    shape, config = sizes.SHAPE, model.config
    piece = piece or shape
    seeds = run.share(range(clips))
    pool = ClipPool(physics_batches(seeds, shape, device, workers=run.workers), len(seeds), shape)
    grid = piece.latent(config.temporal, config.spatial)
    latents = (batch, config.latent_channels, grid.frames, grid.height, grid.width)
    measure: Callable[..., tuple[Tensor, Tensor]] = _reconstruction_loss
    if whole:
        measure = run.compiled_if_asked(measure)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        draws = generator(run.seed, step, device, rank=run.ranks.rank)
        noise = torch.randn(latents, generator=draws, device=device)
        pictures = pool.batch(run.seed, step, batch, rank=run.ranks.rank)
        place = generator(run.seed, step, rank=run.ranks.rank, stream=_PLACES)
        return cut(pictures, piece, place), noise

    def loss(clips: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with mixed_precision(device):
            value, error = measure(model, features, objective, clips, noise)
        return value, {"psnr": -10 * error.log10()}

    plan = LoopConfig(
        steps=run.steps or 12_000, learning_rate=run.rate or 1.5e-3, graphed=run.graphed
    )
    return run.train(model, Objective(draw=draw, loss=loss), plan)


def cut(clips: Tensor, piece: VideoShape, draws: torch.Generator) -> Tensor:
    """Return the first frames of clips (B, T, H, W, 3), cut at one random place.

    Args:
        clips: no smaller than `piece`.
        piece: frames, height and width of what is returned.
        draws: says where; on the CPU.
    """
    rooms = (clips.shape[2] - piece.height, clips.shape[3] - piece.width)
    y, x = (int(torch.randint(room + 1, (), generator=draws)) for room in rooms)
    return clips[:, : piece.frames, y : y + piece.height, x : x + piece.width]


def _reconstruction_loss(
    model: VideoTokenizer,
    features: FeatureNetwork | None,
    objective: ReconstructionObjective,
    clips: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the loss, and the mean squared error in [0, 1].

    Args:
        model: float32.
        features: see `train_reconstruction`.
        objective: likewise.
        clips: uint8 (B, T, H, W, 3).
        noise: unit normal, in the shape of the latents; without a KL term it is not used.
    """
    video, posterior = as_video(clips), None
    if objective.kl is None:
        reconstruction = model.reconstruct(video)
    else:
        latents = model.encode(video)
        posterior = (latents, torch.full_like(latents, 2 * math.log(DEVIATION)))
        reconstruction = model.decode(latents + DEVIATION * noise.to(latents.dtype))
    terms = reconstruction_terms(
        objective, video, reconstruction, 0, features=features, posterior=posterior
    )
    if posterior is not None:
        terms["squared"] = _SQUARED * (reconstruction.float() - video).square()
    error = (reconstruction.detach().float().clamp(-1, 1) - video).square().mean() / 4
    return total(terms), error


def clips_for_statistics(run: Run) -> Iterator[Tensor]:
    """Yield generated clips of which to measure the latents."""
    seeds = range(min(run.clips or 8192, 8192))
    return physics_batches(seeds, sizes.SHAPE, run.device, workers=run.workers)


def tell_psnr(run: Run, done: int, model: VideoTokenizer) -> None:
    """Tell how well a tokenizer gives back clips that are held out."""
    aside = range(sizes.HELD_OUT, sizes.HELD_OUT + min(run.clips or 64, 64))
    held_out = next(physics_batches(aside, sizes.SHAPE, run.device))
    psnr = reconstruction_psnr(model, held_out, half_precision(run.device))
    run.tell({"steps": done, "psnr": psnr})


@torch.no_grad()
def reconstruction_psnr(
    model: VideoTokenizer, clips: Tensor, dtype: torch.dtype = torch.float32
) -> float:
    """Return the mean over clips (B, T, H, W, 3) of the PSNR after encoding and decoding."""
    figures = []
    for clip in clips:
        video = as_video(clip[None])
        decoded = model.reconstruct(video.to(dtype)).float().clamp(-1, 1)
        figures.append(-10 * ((decoded - video).square().mean() / 4).log10())
    return float(torch.stack(figures).mean())


class Moments:
    """Mean and deviation of latents, gathered a batch at a time."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._count = 0

    def add(self, z: Tensor) -> None:
        """Take in latents (B, C, t, h, w)."""
        z = z.double()  # float64: squares of many values are summed
        pair = torch.stack([z.mean((3, 4)), z.square().mean((3, 4))])  # (2, B, C, t)
        self._sums.append(pair.sum(1))
        self._count += len(z)

    def result(self) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of every channel and latent frame, (C, t), float64."""
        mean, square = torch.stack(self._sums).sum(0) / self._count
        return mean, (square - mean.square()).clamp_min(0).sqrt()
