"""Training of the small tokenizers, to token ids or to continuous latents."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from worldline.tokenizers.cosmos import weights as tokenizer_weights
from worldline.tokenizers.cosmos.load import load_tokenizer
from worldline.tokenizers.cosmos.model import CosmosTokenizer
from worldline.tokenizers.cosmos.statistics import LatentStatistics
from worldline.train.data import ClipPool, as_video, physics_batches
from worldline.train.loop import LoopConfig, Objective, generator
from worldline.train.losses import (
    FeatureNetwork,
    ReconstructionObjective,
    Schedule,
    reconstruction_terms,
    total,
)
from worldline.train.tiny import sizes
from worldline.train.tiny.run import Run, half_precision, mixed_precision
from worldline.weights.read import open_checkpoint
from worldline.weights.write import save as save_tensors

_PERCEPTUAL = 0.1  # weight of the perceptual term in the released recipes
# A continuous tokenizer is variational with one deviation for all latents: its noise sets what is
# worth a latent, so that fine detail does not become hard to predict noise.
_DEVIATION = 0.1
_KL = 3e-4
_SQUARED = 5.0  # of its squared error: few pixels, those of moving objects, have most of it
_STATISTICS_FRAMES = 16  # columns of released statistics; the last one is repeated


def train_tokenizer(run: Run, kind: str, features: Path | None, start: Path | None) -> None:
    """Train by the colour term alone, or with `features` by the perceptual term too.

    Args:
        run: how.
        kind: "discrete" or "continuous".
        features: weights of a VGG16-shaped network.
        start: weights to begin with, an export folder.
    """
    batch, clips, device = run.batch or 48, run.clips or 24_000, run.device
    half, shape = half_precision(device), sizes.SHAPE
    torch.manual_seed(run.seed)
    if start is None:
        model = CosmosTokenizer(sizes.TOKENIZER if kind == "discrete" else sizes.CONTINUOUS)
        model.reset_parameters()
        model = model.to(device)
    else:
        model = load_tokenizer(start, device=device, dtype=torch.float32).requires_grad_(True)
    seeds = run.share(range(clips))
    pool = ClipPool(physics_batches(seeds, shape, device, workers=run.workers), len(seeds), shape)
    network = None
    if features is not None:
        stored = open_checkpoint(features)
        network = FeatureNetwork.from_tensors({name: stored.read(name) for name in stored.tensors})
        network = network.to(device)
    objective = ReconstructionObjective(
        perceptual=None if network is None else Schedule.constant(_PERCEPTUAL),
        kl=Schedule.constant(_KL),
    )
    measure = run.compiled_if_asked(_reconstruction_loss)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        config = model.config
        grid = shape.latent(config.temporal, config.spatial)
        latents = (batch, config.latent_channels, grid.frames, grid.height, grid.width)
        draws = generator(run.seed, step, device, rank=run.ranks.rank)
        noise = torch.randn(latents, generator=draws, device=device)
        return pool.batch(run.seed, step, batch, rank=run.ranks.rank), noise

    def loss(clips: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with mixed_precision(device):
            value, error = measure(model, network, objective, clips, noise)
        return value, {"psnr": -10 * error.log10()}

    config = LoopConfig(
        steps=run.steps or 12_000, learning_rate=run.rate or 1.5e-3, graphed=run.graphed
    )
    done = run.train(model, Objective(draw=draw, loss=loss), config)
    if not run.ranks.first:
        return
    export_tokenizer(model, run.folder / "export")
    exported = load_tokenizer(run.folder / "export", device=device, dtype=half)
    if kind == "continuous":
        batches = physics_batches(range(min(clips, 8192)), shape, device, workers=run.workers)
        statistics = latent_statistics(exported, batches, half)
        save_tensors(statistics.tensors(), run.folder / "export" / "mean_std.safetensors")
    aside = range(sizes.HELD_OUT, sizes.HELD_OUT + min(clips, 64))
    held_out = next(physics_batches(aside, shape, device))
    run.tell({"steps": done, "psnr": reconstruction_psnr(exported, held_out, half)})


def _reconstruction_loss(
    model: CosmosTokenizer,
    features: FeatureNetwork | None,
    objective: ReconstructionObjective,
    clips: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the loss, and the mean squared error in [0, 1].

    Args:
        model: float32.
        features: for the perceptual term, if the objective has one.
        objective: with weights that are constant, so that any iteration has the same.
        clips: uint8 (B, T, H, W, 3).
        noise: unit normal, in the shape of the latents; a discrete tokenizer takes none.
    """
    video, posterior = as_video(clips), None
    if model.config.levels is None:
        latents = model.encode(video)
        posterior = (latents, torch.full_like(latents, 2 * math.log(_DEVIATION)))
        reconstruction = model.decode(latents + _DEVIATION * noise.to(latents.dtype))
    else:
        reconstruction = model.reconstruct(video)
    terms = reconstruction_terms(
        objective, video, reconstruction, 0, features=features, posterior=posterior
    )
    if posterior is not None:
        terms["squared"] = _SQUARED * (reconstruction.float() - video).square()
    error = (reconstruction.detach().float().clamp(-1, 1) - video).square().mean() / 4
    return total(terms), error


@torch.no_grad()
def reconstruction_psnr(
    model: CosmosTokenizer, clips: Tensor, dtype: torch.dtype = torch.float32
) -> float:
    """Return the mean over clips (B, T, H, W, 3) of the PSNR after encoding and decoding."""
    figures = []
    for clip in clips:
        video = as_video(clip[None])
        decoded = model.reconstruct(video.to(dtype)).float().clamp(-1, 1)
        figures.append(-10 * ((decoded - video).square().mean() / 4).log10())
    return float(torch.stack(figures).mean())


@torch.no_grad()
def latent_statistics(
    model: CosmosTokenizer, batches: Iterator[Tensor], dtype: torch.dtype
) -> LatentStatistics:
    """Return mean and deviation of latents; the last latent frame's stand for all behind it.

    Args:
        model: in `dtype`.
        batches: clips, uint8 (B, T, H, W, 3).
        dtype: to encode in.
    """
    moments: dict[str, list[Tensor]] = {"": [], "image_": []}
    counts = dict.fromkeys(moments, 0)
    for clips in batches:
        for part in clips.split(32):
            video = as_video(part).to(dtype)
            pictures = video[:, :, :: model.config.temporal].transpose(1, 2).flatten(0, 1)
            latents = {"": model.encode(video), "image_": model.encode(pictures.unsqueeze(2))}
            for name, z in latents.items():
                z = z.double()  # float64: squares of many values are summed
                pair = torch.stack([z.mean((3, 4)), z.square().mean((3, 4))])  # (2, B, C, t)
                moments[name].append(pair.mean(1) * len(z))
                counts[name] += len(z)
    statistics = {}
    for name, parts in moments.items():
        mean, square = torch.stack(parts).sum(0) / counts[name]
        deviation = (square - mean.square()).clamp_min(0).sqrt()
        for kind, values in (("mean", mean), ("std", deviation)):
            columns = values.float().cpu()
            behind = columns[:, -1:].expand(-1, _STATISTICS_FRAMES - columns.shape[1])
            columns = columns[:, 0] if name else torch.cat([columns, behind], dim=1)
            statistics[name + kind] = columns.contiguous()
    return LatentStatistics(**statistics)


def export_tokenizer(model: CosmosTokenizer, folder: Path) -> None:
    """Write encoder and decoder in bf16 under the names of the released files."""
    folder.mkdir(parents=True, exist_ok=True)
    halves = tokenizer_weights.released_tensors(model)
    for half, tensors in halves.items():
        save_tensors(tensors, folder / f"{half}.safetensors")
