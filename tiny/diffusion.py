"""Training of the tiny diffusion transformer, and of its text encoder with it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tiny import sizes
from tiny.denoiser import (
    Batch,
    ClipPositions,
    draw_noise,
    export_transformer,
    latent_scales,
    noise_times,
    train_captioned,
)
from tiny.export import dit_settings, dit_tensors, draw_weights
from tiny.encoders import export_t5, new_t5
from tiny.run import Run, half_precision
from worldline.families.diffusion.model import DiT
from worldline.families.diffusion.weights import open_network
from worldline.sampling.edm import SIGMA_DATA
from worldline.text.t5 import T5Encoder, T5Files
from worldline.tokenizers.cosmos.weights import open_tokenizer
from worldline.train.losses import denoising_loss, log_normal_sigmas, noised_latents
from worldline.weights.stream import load_into

WORLD, TEXT_FOLDER = "Cosmos-Predict1-7B-Video2World", "google-t5/t5-11b"
# Where an object is, how it is turned and what it looks like is settled at noise levels of 10 to 1
# (docs/LOG.md), which most draws hit.
_SIGMA_MEAN, _SIGMA_DEVIATION = 0.7, 1.4
_CONDITIONING_SIGMA = 0.001  # noise on conditioning frames, as in samplers


def train_diffusion(
    run: Run, tokenizer_folder: Path, start: Path | None, negative_prompts: tuple[str, ...]
) -> None:
    """Train the transformer and the text encoder on captioned clips."""
    device = run.device
    scales = latent_scales(tokenizer_folder)
    torch.manual_seed(run.seed)
    model = Denoising(DiT(sizes.DIFFUSION), new_t5(sizes.TEXT, max_length=sizes.TEXT_LENGTH))
    draw_weights(model.transformer)
    if start is not None:
        dit = open_network(start / WORLD, dit_settings(sizes.DIFFUSION))
        load_into(model.transformer, dit.source, dit.keys, device=device, dtype=torch.float32)
        load_into(model.text.network, text.checkpoint, T5_KEYS, device=device, dtype=torch.float32)
        model.requires_grad_(True)
    model = model.to(device)
    tokenizer = load_tokenizer(tokenizer_folder, device=device, dtype=half_precision(device))

    def encode(video: Tensor) -> Tensor:
        return SIGMA_DATA * scales.normalise(tokenizer.encode(video).float())

    # no text, as a sampler may have it: no row at all, or a negative prompt
    blank = model.text.tokenize(["", *negative_prompts])
    blank[1][0] = 0

    def add_noise(step: int, clips: Batch) -> tuple[Tensor, ...]:
        noise = draw_noise(run, step, 2, *clips.latents.shape)
        sigma = log_normal_sigmas(clips.normal, mean=_SIGMA_MEAN, deviation=_SIGMA_DEVIATION)
        return clips.latents, noise, *clips.texts, sigma, clips.num_conditioning

    def export(folder: Path) -> None:
        export_diffusion(model.transformer, model.text, folder)

    train_captioned(run, model, encode, model.text.tokenize, blank, add_noise, export)


class Denoising(nn.Module):
    """The diffusion transformer and its text encoder under one loss."""

    def __init__(self, transformer: DiT, text: T5Encoder) -> None:
        super().__init__()
        self.transformer, self.text = transformer, text
        shape = sizes.SHAPE.latent(sizes.CONTINUOUS.temporal, sizes.CONTINUOUS.spatial)
        self.positions = ClipPositions(transformer, shape)

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        ids: Tensor,
        mask: Tensor,
        sigma: Tensor,
        num_conditioning: Tensor,
    ) -> Tensor:
        """Loss of every clip, (B,).

        latents: (B, C, t, h, w), clean. noise: (2, B, C, t, h, w), for all frames and for
        conditioning frames. ids, mask: (B, S); a text of no token is a context of zeros.
        sigma: (B,).
        """
        noised, conditioning = noised_latents(
            latents,
            noise[0],
            sigma,
            num_conditioning,
            conditioning_noise=noise[1],
            conditioning_sigma=torch.full_like(sigma, _CONDITIONING_SIGMA),
        )
        attended = mask.clone()
        attended[:, 0] = 1  # attention over no token at all is not defined
        hidden = self.text.hidden(ids, attended)
        context = torch.where(mask[..., None] != 0, hidden, hidden.new_zeros(()))
        output = self.transformer(
            noised,
            noise_times(sigma),
            self.transformer.encode_context(context),
            self.positions(self.transformer),
            condition_mask=conditioning,
        )
        return denoising_loss(output, latents, noise[0], sigma, conditioning)


def export_diffusion(transformer: DiT, text: T5Encoder, folder: Path) -> None:
    """Write the world and its text encoder in bf16, in the folders of the released ones."""
    settings = {**dit_settings(transformer.config), **sizes.WORLD_SETTINGS}
    export_transformer(dit_tensors(transformer), settings, folder / WORLD)
    export_t5(text, folder / TEXT_FOLDER)
