"""Training of the small tokenizers, to token ids or to continuous latents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tiny import sizes
from tiny.data import as_video
from tiny.reconstruction import (
    KL,
    Moments,
    clips_for_statistics,
    tell_psnr,
    train_reconstruction,
)
from tiny.run import Run, half_precision
from tiny.export import cosmos_tensors, draw_weights
from worldline.tokenizers.cosmos import weights as tokenizer_weights
from worldline.tokenizers.cosmos.weights import open_tokenizer
from worldline.tokenizers.cosmos.model import CosmosTokenizer
from worldline.tokenizers.cosmos.model import LatentStatistics
from worldline.train.losses import FeatureNetwork, ReconstructionObjective, Schedule
from worldline.weights.read import open_checkpoint
from worldline.weights.write import save as save_tensors

_PERCEPTUAL = 0.1  # weight of the perceptual term in the released recipes
_STATISTICS_FRAMES = 16  # columns of released statistics; the last one is repeated


def train_tokenizer(run: Run, kind: str, features: Path | None, start: Path | None) -> None:
    """Train by the colour term alone, or with `features` by the perceptual term too.

    Args:
        run: how.
        kind: "discrete" or "continuous".
        features: weights of a VGG16-shaped network.
        start: weights to begin with, an export folder.
    """
    device, half = run.device, half_precision(run.device)
    torch.manual_seed(run.seed)
    if start is None:
        model = CosmosTokenizer(sizes.TOKENIZER if kind == "discrete" else sizes.CONTINUOUS)
        draw_weights(model)
        model = model.to(device)
    else:
        model = tokenizer_weights.open_tokenizer(start).read(device, torch.float32)
        model = model.requires_grad_(True)
    network = None
    if features is not None:
        stored = open_checkpoint(features)
        network = FeatureNetwork.from_tensors({name: stored.read(name) for name in stored.tensors})
        network = network.to(device)
    objective = ReconstructionObjective(
        perceptual=None if network is None else Schedule.constant(_PERCEPTUAL),
        kl=KL if model.config.levels is None else None,
    )
    done = train_reconstruction(run, model, objective, network)
    if not run.ranks.first:
        return
    export_tokenizer(model, run.folder / "export")
    exported = tokenizer_weights.open_tokenizer(run.folder / "export").read(device, half)
    if kind == "continuous":
        statistics = latent_statistics(exported, clips_for_statistics(run), half)
        save_tensors(statistics.tensors(), run.folder / "export" / "mean_std.safetensors")
    tell_psnr(run, done, exported)


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
    moments = {"": Moments(), "image_": Moments()}
    for clips in batches:
        for part in clips.split(32):
            video = as_video(part).to(dtype)
            pictures = video[:, :, :: model.config.temporal].transpose(1, 2).flatten(0, 1)
            moments[""].add(model.encode(video))
            moments["image_"].add(model.encode(pictures.unsqueeze(2)))
    statistics = {}
    for name, found in moments.items():
        for kind, values in zip(("mean", "std"), found.result(), strict=True):
            columns = values.float().cpu()
            behind = columns[:, -1:].expand(-1, _STATISTICS_FRAMES - columns.shape[1])
            columns = columns[:, 0] if name else torch.cat([columns, behind], dim=1)
            statistics[name + kind] = columns.contiguous()
    return LatentStatistics(**statistics)


def export_tokenizer(model: CosmosTokenizer, folder: Path) -> None:
    """Write encoder and decoder in bf16 under the names of the released files."""
    folder.mkdir(parents=True, exist_ok=True)
    halves = cosmos_tensors(model)
    for half, tensors in halves.items():
        save_tensors(tensors, folder / f"{half}.safetensors")
