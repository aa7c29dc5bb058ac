"""Recipe of the tiny tokenizer that is laid out as Wan2.1's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tiny import sizes
from tiny.export import export_network, stored_tensors
from tiny.reconstruction import (
    DEVIATION,
    KL,
    Moments,
    report_psnr,
    statistics_videos,
    train_reconstruction,
)
from tiny.run import Run, recipe
from worldline.tokenizers.layouts import wan_settings
from worldline.tokenizers.wan.model import CausalConv, WanTokenizer
from worldline.tokenizers.wan.weights import key_map, open_wan
from worldline.weights.networks import DIFFUSERS_FILES

_SHAPES = 64  # of cells that are prepared for a convolution; no two levels have the same


@recipe()
def wan(run: Run) -> None:
    """Train a video tokenizer laid out as Wan2.1's, to continuous latents.

    Latents are raw in training, normalised in the export.
    """
    torch.manual_seed(run.seed)
    model = run.network(WanTokenizer, sizes.WAN, open_wan(run.start) if run.start else None)
    model.channels_last()
    channels = model.config.latent_channels
    model.config = replace(model.config, mean=(0.0,) * channels, std=(1.0,) * channels)
    if run.compiled:
        compile_between_convolutions(model)
    done = train_reconstruction(run, model, KL, piece=sizes.WAN_PIECE, compiled=False)
    if not run.ranks.first:
        return
    folder = run.folder / "export"
    export_wan(model, folder)
    exported = open_wan(folder).read(run.device, run.half)
    mean, std = channel_statistics(exported, statistics_videos(run))
    exported.config = model.config = replace(model.config, mean=mean, std=std)
    export_wan(model, folder)
    report_psnr(run, done, exported)


def compile_between_convolutions(model: WanTokenizer) -> None:
    """Compile what lies between two convolutions into one kernel; these stay with cuDNN.

    The few small functions are compiled in a fraction of the time that the whole network takes.
    """
    torch._dynamo.config.recompile_limit = _SHAPES
    for module in model.modules():
        if isinstance(module, CausalConv):
            module.prepare = torch.compile(module.prepare, dynamic=False)


@torch.no_grad()
def channel_statistics(model: WanTokenizer, videos: Iterator[Tensor]) -> list[tuple[float, ...]]:
    """Mean and deviation of every channel of the latents."""
    moments = Moments()
    for video in videos:
        moments.add(model.encode(video).flatten(2, 3).unsqueeze(2))  # all latent frames as one
    return [tuple(values[:, 0].tolist()) for values in moments.result()]


def export_wan(model: WanTokenizer, folder: Path) -> None:
    """Write weights by diffusers' names, and config.json with the statistics of latents."""
    channels = model.config.latent_channels
    with torch.no_grad():  # the variance, which training keeps fixed
        model.quant_conv.weight[channels:] = 0
        model.quant_conv.bias[channels:] = 2 * math.log(DEVIATION)
    tensors = stored_tensors(model, key_map(model.config, True))
    export_network(tensors, wan_settings(model.config), folder, DIFFUSERS_FILES[0])
