"""Training of the small tokenizer that is laid out as Wan2.1's."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tiny import sizes
from tiny.data import as_video
from tiny.reconstruction import (
    DEVIATION,
    KL,
    Moments,
    clips_for_statistics,
    tell_psnr,
    train_reconstruction,
)
from tiny.run import Run, half_precision
from tiny.export import draw_weights, stored_tensors, wan_settings
from worldline.tokenizers.wan.model import CausalConv, WanTokenizer, WanTokenizerConfig
from worldline.tokenizers.wan.weights import key_map, open_wan
from worldline.train.losses import ReconstructionObjective
from worldline.weights.networks import DIFFUSERS_FILES
from worldline.weights.write import save as save_tensors

_SHAPES = 64  # of cells that are prepared for a convolution; no two levels have the same


def train_wan(run: Run, start: Path | None) -> None:
    """Train on generated clips; latents are left as they come, and normalised in what is written.

    Args:
        run: how.
        start: weights to begin with, an export folder.
    """
    device, half = run.device, half_precision(run.device)
    torch.manual_seed(run.seed)
    if start is None:
        model = WanTokenizer(sizes.WAN)
        draw_weights(model)
        model = model.to(device).channels_last()
    else:
        model = open_wan(start).read(device, torch.float32).requires_grad_(True)
    model.config = _unscaled(model.config)
    if run.compiled:
        compile_between_convolutions(model)
    objective = ReconstructionObjective(kl=KL)
    done = train_reconstruction(run, model, objective, piece=sizes.WAN_PIECE, whole=False)
    if not run.ranks.first:
        return
    folder = run.folder / "export"
    export_wan(model, folder)
    exported = open_wan(folder).read(device, half)
    mean, std = channel_statistics(exported, clips_for_statistics(run), half)
    exported.config = model.config = replace(model.config, mean=mean, std=std)
    export_wan(model, folder)
    tell_psnr(run, done, exported)


def _unscaled(config: WanTokenizerConfig) -> WanTokenizerConfig:
    """Return a configuration whose latents are what the encoder says."""
    channels = config.latent_channels
    return replace(config, mean=(0.0,) * channels, std=(1.0,) * channels)


def compile_between_convolutions(model: WanTokenizer) -> None:
    """Let one kernel do what lies between two convolutions; these are left to cuDNN.

    The few small functions are compiled in a fraction of the time that the whole network takes.
    """
    torch._dynamo.config.recompile_limit = _SHAPES
    for module in model.modules():
        if isinstance(module, CausalConv):
            module.prepare = torch.compile(module.prepare, dynamic=False)


@torch.no_grad()
def channel_statistics(
    model: WanTokenizer, batches: Iterator[Tensor], dtype: torch.dtype
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of every channel of the latents.

    Args:
        model: in `dtype`.
        batches: clips, uint8 (B, T, H, W, 3).
        dtype: to encode in.
    """
    moments = Moments()
    for clips in batches:
        for part in clips.split(32):
            z = model.encode(as_video(part).to(dtype))
            moments.add(z.flatten(2, 3).unsqueeze(2))  # all latent frames as one
    mean, deviation = (tuple(values[:, 0].tolist()) for values in moments.result())
    return mean, deviation


def export_wan(model: WanTokenizer, folder: Path) -> None:
    """Write weights in bf16 by diffusers' names, and config.json with the statistics of latents."""
    channels = model.config.latent_channels
    with torch.no_grad():  # the variance, which training keeps fixed
        model.quant_conv.weight[channels:] = 0
        model.quant_conv.bias[channels:] = 2 * math.log(DEVIATION)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = stored_tensors(model, key_map(model.config, True))
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_tensors(tensors, folder / DIFFUSERS_FILES[0])
    said = json.dumps(wan_settings(model.config), indent=1)
    (folder / "config.json").write_text(said + "\n")
