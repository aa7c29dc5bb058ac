"""Training of the small diffusion transformer, and of its text encoder with it.

A clip is given with none, one or two latent frames known and with its caption or none, so that one
network makes a world of a text, an image or a video.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn

from tiny import sizes
from tiny.denoiser import (
    Captioned,
    Places,
    draw_clips,
    draw_noise,
    encode_clips,
    export_transformer,
    scales_of,
    told_level,
    train_denoiser,
)
from tiny.encoders import export_t5, new_t5
from tiny.run import Run, half_precision
from worldline.families.diffusion.model import DiT
from worldline.families.diffusion.weights import open_dit, released_tensors, write_settings
from worldline.sampling.edm import SIGMA_DATA
from worldline.text.t5 import T5Encoder, T5Files
from worldline.tokenizers.cosmos.weights import open_tokenizer
from worldline.train.losses import denoising_loss, log_normal_sigmas, noised_latents
from worldline.weights.stream import load_into

WORLD, TEXT_FOLDER = "Cosmos-Predict1-7B-Video2World", "google-t5/t5-11b"
# Where an object is, how it is turned and what it looks like is settled at noise levels of 10 to 1
# (docs/LOG.md), which most draws hit.
_SIGMA_MEAN, _SIGMA_DEVIATION = 0.7, 1.4
_KNOWN_SIGMA = 0.001  # noise on known frames, as samplers show them


def train_diffusion(
    run: Run, tokenizer_folder: Path, start: Path | None, undescribed: tuple[str, ...]
) -> None:
    """Train the diffusion transformer, and the text encoder with it, on captioned clips.

    Args:
        run: how.
        tokenizer_folder: an export folder, with statistics.
        start: weights to begin with, an export folder.
        undescribed: texts that shall say nothing of a clip.

    Raises:
        CheckpointError: the continuous tokenizer has no statistics.
    """
    batch, clips, device = run.batch or 256, run.clips or 80_000, run.device
    scales = scales_of(tokenizer_folder)
    half = half_precision(device)
    torch.manual_seed(run.seed)
    model = Denoising(DiT(sizes.DIFFUSION), new_t5(sizes.TEXT, max_length=sizes.TEXT_LENGTH))
    model.transformer.reset_parameters()
    if start is not None:
        dit = open_dit(start / WORLD, write_settings(sizes.DIFFUSION))
        load_into(model.transformer, dit.source, dit.keys, device=device, dtype=torch.float32)
        model.text = T5Files.open(start / TEXT_FOLDER).load(device, torch.float32).train()
        model.requires_grad_(True)
    model = model.to(device)
    coder = open_tokenizer(tokenizer_folder).read(device, half)

    def encode(video: Tensor) -> Tensor:
        return SIGMA_DATA * scales.normalise(coder.encode(video).float())

    tokenize = model.text.tokenize
    pool = encode_clips(run, run.share(range(clips)), run.workers, encode, tokenize)
    held_out = range(sizes.HELD_OUT, sizes.HELD_OUT + min(clips, 256))
    aside = encode_clips(run, held_out, 0, encode, tokenize)
    # no text, as a sampler may give it: no row at all, or a text about nothing
    silent = tokenize(["", *undescribed])
    silent[1][0] = 0

    def draw_from(given: Captioned, step: int) -> tuple[Tensor, ...]:
        latents, texts, known, normal = draw_clips(run, given, silent, step, batch)
        noise = draw_noise(run, step, 2, *latents.shape)
        sigma = log_normal_sigmas(normal, mean=_SIGMA_MEAN, deviation=_SIGMA_DEVIATION)
        return latents, noise, *texts, sigma, known

    train_denoiser(
        run,
        model,
        functools.partial(draw_from, pool),
        functools.partial(draw_from, aside),
        lambda folder: export_diffusion(model.transformer, model.text, folder),
    )


class Denoising(nn.Module):
    """The diffusion transformer and its text encoder under one loss."""

    def __init__(self, transformer: DiT, text: T5Encoder) -> None:
        super().__init__()
        self.transformer, self.text = transformer, text
        shape = sizes.SHAPE.latent(sizes.CONTINUOUS.temporal, sizes.CONTINUOUS.spatial)
        self.places = Places(transformer, shape)

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        ids: Tensor,
        mask: Tensor,
        sigma: Tensor,
        known: Tensor,
    ) -> Tensor:
        """Return the loss of every clip, (B,).

        Args:
            latents: (B, C, t, h, w), clean.
            noise: (2, B, C, t, h, w): of all frames, and that of known frames.
            ids: (B, S) of texts.
            mask: (B, S), 1 at tokens; a text of no token is an embedding of zeros.
            sigma: (B,) noise levels.
            known: (B,) latent frames that are known.
        """
        level = torch.full_like(sigma, _KNOWN_SIGMA)
        shown, marked = noised_latents(
            latents, noise[0], sigma, known, conditioning_noise=noise[1], conditioning_sigma=level
        )
        attended = mask.clone()
        attended[:, 0] = 1  # attention over no token at all is not defined
        hidden = self.text.hidden(ids, attended)
        context = torch.where(mask[..., None] != 0, hidden, hidden.new_zeros(()))
        output = self.transformer(
            shown,
            told_level(sigma),
            self.transformer.encode_context(context),
            self.places(self.transformer),
            condition_mask=marked,
        )
        return denoising_loss(output, latents, noise[0], sigma, marked)


def export_diffusion(transformer: DiT, text: T5Encoder, folder: Path) -> None:
    """Write the world and its text encoder in bf16, in the folders of the released ones."""
    settings = {**write_settings(transformer.config), **sizes.WORLD_SETTINGS}
    export_transformer(released_tensors(transformer), settings, folder / WORLD)
    export_t5(text, folder / TEXT_FOLDER)
