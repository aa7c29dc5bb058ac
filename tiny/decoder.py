"""Recipe of the tiny diffusion decoder: latents of a fine tokenizer from tokens of a coarse one.

It is trained window by window, as it is used. A window that begins with a later token frame starts
at the last of the eight frames that this token stands for, since the fine tokenizer's first latent
frame stands for one. A short clip fills its window by reflection.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from torch import Tensor, nn

from tiny import sizes
from tiny.clips import as_video, clip_batches, to_device, views
from tiny.denoiser import (
    ClipPositions,
    Clips,
    draw_noise,
    latent_scales,
    noise_times,
    train_denoiser,
)
from tiny.encoders import embed_captions
from tiny.export import dit_settings, dit_tensors, export_network
from tiny.run import EXISTING, TOKENIZER, Run, recipe
from worldline.catalog import DECODERS
from worldline.families.diffusion.model import DECODER_WINDOW, DiT
from worldline.families.diffusion.weights import open_network
from worldline.losses import denoising_loss, log_normal_sigmas, noised_latents
from worldline.sampling.edm import SIGMA_DATA
from worldline.sampling.tokens import split_windows
from worldline.shapes import LatentShape, VideoShape
from worldline.text.t5 import T5Files
from worldline.tokenizers.cosmos.model import CosmosTokenizer, LatentStatistics
from worldline.tokenizers.cosmos.weights import open_tokenizer
from worldline.train.loop import generator
from worldline.weights.checkpoint import save

DECODER = DECODERS["Predict1"]
GENERAL_PROMPT = "A video of moving objects."  # where a request has no prompt
_SIGMA_MEAN, _SIGMA_DEVIATION = 0.0, 1.4  # tokens fix what is where: little is open above 4
_GENERAL = 0.4  # share of clips with the general prompt
_DROPPED = 0.1  # share with neither prompt nor tokens
_WINDOWS_A_CLIP = 3  # the first, a later one, and the first of the clip cut short


@recipe(
    TOKENIZER,
    click.option(
        "--latents", type=EXISTING, required=True, help="Export folder of a continuous tokenizer."
    ),
    click.option("--text", type=EXISTING, required=True, help="Folder of a T5 encoder."),
)
def decoder(run: Run, tokenizer: Path, latents: Path, text: Path) -> None:
    """Train the diffusion decoder, which turns tokens into finer latents than their own."""
    batch, clips, device = run.batch or 256, run.clips or 30_000, run.device
    stored = open_tokenizer(latents)
    statistics = latent_scales(stored)
    coarse = open_tokenizer(tokenizer).read(device, run.half)
    fine = stored.read(device, run.half)
    encoder = T5Files.open(text).read(device, run.half)
    general = encoder.encode([GENERAL_PROMPT])

    def encode(seeds: range, workers: int) -> Clips:
        """Latents and tokens of windows, and the context (windows, S, E) of their captions."""
        parts = []
        draws = generator(run.seed, 0, rank=run.ranks.rank)
        batches = clip_batches(seeds, long_shape(), device, batch=64, workers=workers)
        for pictures, captions in views(batches):
            video = as_video(pictures).to(run.half)
            context = embed_captions(encoder, captions).repeat_interleave(_WINDOWS_A_CLIP, 0)
            parts.append((*cut_windows(coarse, fine, statistics, video, draws), context))
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    pool = encode(run.seeds(clips), run.workers)
    held_out = encode(run.held_out(128, clips), 0)
    torch.manual_seed(run.seed)
    start = open_network(run.start / DECODER) if run.start else None
    model = Decoding(run.network(DiT, sizes.DECODER, start)).to(device)

    def draw(windows: Clips, step: int) -> tuple[Tensor, ...]:
        draws = generator(run.seed, step, rank=run.ranks.rank)
        chosen = torch.randint(len(windows[0]), (batch,), generator=draws)
        kind = torch.rand(batch, generator=draws)
        normal = torch.randn(batch, generator=draws)
        sigma = log_normal_sigmas(normal, mean=_SIGMA_MEAN, deviation=_SIGMA_DEVIATION)
        chosen, kind, sigma = (to_device(values, device) for values in (chosen, kind, sigma))
        z, tokens, context = (part[chosen] for part in windows)
        dropped = kind < _DROPPED
        unspecific = (kind < _DROPPED + _GENERAL)[:, None, None]
        context = torch.where(unspecific, general, context)
        context = context.masked_fill(dropped[:, None, None], 0)
        tokens = tokens.long().masked_fill(dropped[:, None, None, None], 0)
        return z.float(), draw_noise(run, step, *z.shape), tokens, context, sigma

    def export(folder: Path) -> None:
        settings = dit_settings(model.transformer.config)
        settings["rotary_precision"] = sizes.ROTARY_PRECISION
        export_network(dit_tensors(model.transformer), settings, folder / DECODER)
        save({"context": general.bfloat16()}, folder / DECODER / "aux_vars.safetensors")

    train_denoiser(run, model, pool, held_out, draw, export)


def long_shape() -> VideoShape:
    """Size of clips in which windows may begin at any token frame but the last ones."""
    frames = 1 + 8 * (2 * DECODER_WINDOW - 2)
    return VideoShape(frames, sizes.SHAPE.height, sizes.SHAPE.width)


@torch.no_grad()
def cut_windows(
    coarse: CosmosTokenizer,
    fine: CosmosTokenizer,
    statistics: LatentStatistics,
    video: Tensor,
    draws: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Latents and tokens of `_WINDOWS_A_CLIP` windows of each clip.

    Latents are (windows, C, T, H, W), bf16, of standard deviation 0.5, tokens (windows, T, h, w).
    Video is (B, 3, T, H, W) in [-1, 1], of `long_shape`, in the tokenizers' dtype; `draws`, on the
    CPU, draws where the later windows of these clips begin.
    """
    size, temporal = DECODER_WINDOW, fine.config.temporal
    length = 1 + (size - 1) * temporal  # frames of a window
    short = sizes.GRID.frames
    ids = coarse.encode_tokens(video)  # (B, T, h, w)
    later = int(torch.randint(1, size - 1, (), generator=draws))
    first, second = (
        SIGMA_DATA * statistics.normalise(fine.encode(piece).float())
        for piece in (video[:, :, at : at + length] for at in (0, temporal * later))
    )
    cut = split_windows(first[:, :, :short].transpose(1, 2), size, 0)[0].transpose(1, 2)
    tokens = [
        ids[:, :size],
        ids[:, later : later + size],
        split_windows(ids[:, :short], size, 0)[0],
    ]
    # window after window of one clip, so that its caption can be repeated
    latents = torch.stack([first, second, cut], 1).flatten(0, 1).bfloat16()
    return latents, torch.stack(tokens, 1).flatten(0, 1).to(torch.int16)


class Decoding(nn.Module):
    """The decoder's transformer under its loss."""

    def __init__(self, transformer: DiT) -> None:
        super().__init__()
        self.transformer = transformer
        shape = sizes.SHAPE.latent(sizes.CONTINUOUS.temporal, sizes.CONTINUOUS.spatial)
        self.grid = LatentShape(DECODER_WINDOW, shape.height, shape.width)
        self.positions = ClipPositions(transformer, self.grid)

    def forward(
        self, latents: Tensor, noise: Tensor, tokens: Tensor, context: Tensor, sigma: Tensor
    ) -> Tensor:
        """Loss of every window, (B,).

        latents: (B, C, T, H, W), clean. noise: in their shape. tokens: (B, T, h, w), int64.
        context: (B, S, E). sigma: (B,).
        """
        output = self.transformer(
            noised_latents(latents, noise, sigma),
            noise_times(sigma),
            self.transformer.encode_context(context),
            self.positions(self.transformer),
            ids=self.transformer.encode_ids(tokens, self.grid),
        )
        return denoising_loss(output, latents, noise, sigma, torch.zeros_like(latents[:, :1]))
