"""Recipe of the tiny diffusion transformer, and of its text encoder with it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tiny import sizes
from tiny.denoiser import (
    ClipPositions,
    latent_scales,
    noise_times,
    train_captioned,
)
from tiny.encoders import export_t5, new_t5
from tiny.export import dit_settings, dit_tensors, draw_weights, export_network
from tiny.run import NEGATIVE_PROMPT, TOKENIZER, Run, recipe
from worldline.families.diffusion.model import DiT
from worldline.families.diffusion.weights import open_network
from worldline.losses import (
    condition_mask,
    denoising_loss,
    log_normal_sigmas,
    noised_latents,
)
from worldline.sampling.edm import SIGMA_DATA
from worldline.text.t5 import T5Encoder, T5Files
from worldline.tokenizers.cosmos.weights import open_tokenizer

WORLD, TEXT_FOLDER = "Cosmos-Predict1-7B-Video2World", "google-t5/t5-11b"
# Where an object is, how it is turned and what it looks like is settled at noise levels of 10 to 1
# (docs/LOG.md), which most draws hit.
_SIGMA_MEAN, _SIGMA_DEVIATION = 0.7, 1.4
_CONDITIONING_SIGMA = 0.001  # noise on conditioning frames, as in samplers


@recipe(TOKENIZER, NEGATIVE_PROMPT)
def diffusion(run: Run, tokenizer: Path, negative_prompt: tuple[str, ...]) -> None:
    """Train the diffusion transformer, and its T5 encoder with it, on captioned clips.

    A clip has none, one or two conditioning latent frames and its caption or none, so that one
    network makes a video of a text, an image or a video.
    """
    stored = open_tokenizer(tokenizer)
    scales = latent_scales(stored)
    torch.manual_seed(run.seed)
    model = Denoising(DiT(sizes.DIFFUSION), new_t5(sizes.TEXT, max_length=sizes.TEXT_LENGTH))
    draw_weights(model.transformer)
    if run.start:
        model.transformer = open_network(run.start / WORLD).read(run.device, torch.float32)
        model.text = T5Files.open(run.start / TEXT_FOLDER).read(run.device, torch.float32)
    model = model.requires_grad_(True).to(run.device)
    coder = stored.read(run.device, run.half)

    def encode(video: Tensor) -> Tensor:
        return SIGMA_DATA * scales.normalise(coder.encode(video).float())

    # no text, as a sampler may have it: no row at all, or a negative prompt
    blank = model.text.tokenize(["", *negative_prompt])
    blank[1][0] = 0

    def export(folder: Path) -> None:
        settings = {**dit_settings(model.transformer.config), **sizes.WORLD_SETTINGS}
        export_network(dit_tensors(model.transformer), settings, folder / WORLD)
        export_t5(model.text, folder / TEXT_FOLDER)

    levels = partial(log_normal_sigmas, mean=_SIGMA_MEAN, deviation=_SIGMA_DEVIATION)
    train_captioned(run, model, encode, model.text.tokenize, blank, levels, export, noises=(2,))


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
        known = condition_mask(latents, num_conditioning)
        slightly = torch.full_like(sigma, _CONDITIONING_SIGMA)
        noised = torch.where(
            known != 0,
            noised_latents(latents, noise[1], slightly),
            noised_latents(latents, noise[0], sigma),
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
            condition_mask=known,
        )
        return denoising_loss(output, latents, noise[0], sigma, known)
