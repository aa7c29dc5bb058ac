"""Training of the tiny Cosmos tokenizers, to token ids or to continuous latents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tiny import sizes
from tiny.export import cosmos_tensors, draw_weights
from tiny.reconstruction import KL, Moments, report_psnr, statistics_videos, train_reconstruction
from tiny.run import Run, half_precision
from worldline.tokenizers.cosmos.model import CosmosTokenizer, LatentStatistics
from worldline.tokenizers.cosmos.weights import open_tokenizer
from worldline.train.losses import ReconstructionObjective
from worldline.weights.write import save as save_tensors

_STATISTICS_FRAMES = 16  # columns of released statistics; the last one is repeated


def train_tokenizer(run: Run, kind: str, start: Path | None) -> None:
    """Train a "discrete" or "continuous" tokenizer."""
    torch.manual_seed(run.seed)
    if start is None:
        model = CosmosTokenizer(sizes.TOKENIZER if kind == "discrete" else sizes.CONTINUOUS)
        draw_weights(model)
        model = model.to(device)
    else:
        model = open_tokenizer(start).read(run.device, torch.float32).requires_grad_(True)
    continuous = model.config.levels is None
    done = train_reconstruction(run, model, KL if continuous else ReconstructionObjective())
    if not run.ranks.first:
        return
    export = run.folder / "export"
    export_tokenizer(model, export)
    exported = load_tokenizer(export, device=run.device, dtype=half_precision(run.device))
    if continuous:
        statistics = latent_statistics(exported, statistics_videos(run))
        save_tensors(statistics.tensors(), export / "mean_std.safetensors")
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
    halves = cosmos_tensors(model)
    for half, tensors in halves.items():
        save_tensors(tensors, folder / f"{half}.safetensors")
