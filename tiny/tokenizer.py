"""Recipe of the tiny Cosmos tokenizers, to token ids or to continuous latents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import torch
from torch import Tensor

from tiny import sizes
from tiny.export import cosmos_tensors
from tiny.reconstruction import KL, Moments, report_psnr, statistics_videos, train_reconstruction
from tiny.run import Run, recipe
from worldline.losses import ReconstructionObjective
from worldline.tokenizers.cosmos.model import CosmosTokenizer, LatentStatistics
from worldline.tokenizers.cosmos.weights import open_tokenizer
from worldline.weights.checkpoint import save

_STATISTICS_FRAMES = 16  # columns of released statistics; the last one is repeated


@recipe(click.option("--kind", type=click.Choice(["discrete", "continuous"]), default="discrete"))
def tokenizer(run: Run, kind: str) -> None:
    """Train a video tokenizer to token ids or to continuous latents."""
    torch.manual_seed(run.seed)
    config = sizes.TOKENIZER if kind == "discrete" else sizes.CONTINUOUS
    stored = open_tokenizer(run.start) if run.start else None
    model = run.network(CosmosTokenizer, config, stored)
    continuous = model.config.levels is None
    done = train_reconstruction(run, model, KL if continuous else ReconstructionObjective())
    if not run.ranks.first:
        return
    export = run.folder / "export"
    export_tokenizer(model, export)
    exported = open_tokenizer(export).read(run.device, run.half)
    if continuous:
        statistics = latent_statistics(exported, statistics_videos(run))
        save(statistics.tensors(), export / "mean_std.safetensors")
    report_psnr(run, done, exported)


@torch.no_grad()
def latent_statistics(model: CosmosTokenizer, videos: Iterator[Tensor]) -> LatentStatistics:
    """Mean and deviation of latents; those of the last latent frame stand for all behind it."""
    moments = {"": Moments(), "image_": Moments()}
    for video in videos:
        pictures = video[:, :, :: model.config.temporal].transpose(1, 2).flatten(0, 1)
        moments[""].add(model.encode(video))
        moments["image_"].add(model.encode(pictures.unsqueeze(2)))
    statistics = {}
    for name, moment in moments.items():
        for kind, values in zip(("mean", "std"), moment.result(), strict=True):
            columns = values.float().cpu()
            behind = columns[:, -1:].expand(-1, _STATISTICS_FRAMES - columns.shape[1])
            columns = columns[:, 0] if name else torch.cat([columns, behind], dim=1)
            statistics[name + kind] = columns.contiguous()
    return LatentStatistics(**statistics)


def export_tokenizer(model: CosmosTokenizer, folder: Path) -> None:
    """Write encoder and decoder in bf16 under the names of the released files."""
    folder.mkdir(parents=True, exist_ok=True)
    for half, tensors in cosmos_tensors(model).items():
        save(tensors, folder / f"{half}.safetensors")
