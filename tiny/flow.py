"""Training of the small flow transformer, and of its text encoder with it.

A clip is given with none, one or two latent frames known and with its caption or none, so that one
network makes a world of a text, an image or a video.
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from tiny import sizes
from tiny.denoiser import (
    Captioned,
    draw_clips,
    draw_noise,
    encode_clips,
    export_transformer,
    train_denoiser,
)
from tiny.encoders import export_reason1, new_reason1
from tiny.run import Run, half_precision
from worldline.families.predict2_5.model import FlowDiT
from worldline.families.predict2_5.weights import open_flow_dit, released_tensors, write_settings
from worldline.nn.rope import Rotation
from worldline.sampling.flow import TIMESTEPS
from worldline.text.reason1 import RELEASED as TEXT_FOLDER
from worldline.text.reason1 import Reason1Encoder, Reason1Files
from worldline.tokenizers.wan.weights import open_wan
from worldline.train.losses import flow_loss, flowed_latents, shifted_sigmas
from worldline.weights.stream import load_into

WORLD = "Cosmos-Predict2.5-2B"
# Wider than the released recipes' 1: the last of 20 steps is at 0.2, which one draw in 600 would
# reach, too few for a short run.
_DEVIATION = 1.4


def train_flow(
    run: Run, tokenizer_folder: Path, start: Path | None, undescribed: tuple[str, ...]
) -> None:
    """Train the flow transformer, and the text encoder with it, on captioned clips.

    Args:
        run: how.
        tokenizer_folder: an export folder of the tokenizer; copied into the world's.
        start: weights to begin with, an export folder.
        undescribed: texts that shall say nothing of a clip, as the empty one.
    """
    batch, clips, device = run.batch or 256, run.clips or 80_000, run.device
    coder = open_wan(tokenizer_folder).read(device, half_precision(device))
    torch.manual_seed(run.seed)
    model = Flowing(FlowDiT(sizes.FLOW), new_reason1(sizes.REASON1, max_length=sizes.TEXT_LENGTH))
    model.transformer.reset_parameters()
    if start is not None:
        dit = open_flow_dit(start / WORLD, write_settings(sizes.FLOW))
        load_into(model.transformer, dit.source, dit.keys, device=device, dtype=torch.float32)
        model.text = Reason1Files.open(start / TEXT_FOLDER).load(device, torch.float32).train()
        model.requires_grad_(True)
    model = model.to(device)

    def tokenize(texts: list[str]) -> tuple[Tensor, ...]:
        return (model.text.tokenize(texts),)

    pool = encode_clips(run, run.share(range(clips)), run.workers, coder.encode, tokenize)
    held_out = range(sizes.HELD_OUT, sizes.HELD_OUT + min(clips, 256))
    aside = encode_clips(run, held_out, 0, coder.encode, tokenize)
    silent = tokenize(["", *undescribed])

    def draw_from(given: Captioned, step: int) -> tuple[Tensor, ...]:
        latents, texts, known, normal = draw_clips(run, given, silent, step, batch)
        noise = draw_noise(run, step, *latents.shape)
        return latents, noise, *texts, shifted_sigmas(normal, deviation=_DEVIATION), known

    train_denoiser(
        run,
        model,
        functools.partial(draw_from, pool),
        functools.partial(draw_from, aside),
        lambda folder: export_flow(model.transformer, model.text, tokenizer_folder, folder),
    )


class Flowing(nn.Module):
    """The flow transformer and its text encoder under one loss."""

    cos: Tensor
    sin: Tensor

    def __init__(self, transformer: FlowDiT, text: Reason1Encoder) -> None:
        super().__init__()
        self.transformer, self.text = transformer, text
        grid = sizes.SHAPE.latent(sizes.WAN.temporal, sizes.WAN.spatial)
        positions = transformer.make_positions(grid)
        self.register_buffer("cos", positions.cos, persistent=False)
        self.register_buffer("sin", positions.sin, persistent=False)

    def forward(
        self, latents: Tensor, noise: Tensor, ids: Tensor, sigma: Tensor, known: Tensor
    ) -> Tensor:
        """Return the loss of every clip, (B,).

        Args:
            latents: (B, C, t, h, w), clean.
            noise: in their shape.
            ids: (B, S) of texts, all rows of which count.
            sigma: (B,) noise levels.
            known: (B,) latent frames that are known.
        """
        shown, marked = flowed_latents(latents, noise, sigma, known)
        told = (TIMESTEPS * sigma).floor()  # as samplers tell it, of all frames alike
        velocity = self.transformer(
            shown,
            told[:, None],
            self.transformer.encode_context(self.text.embed(ids)),
            Rotation(self.cos, self.sin),
            condition_mask=marked,
        )
        return flow_loss(velocity, latents, noise, marked)


def export_flow(
    transformer: FlowDiT, text: Reason1Encoder, tokenizer_folder: Path, folder: Path
) -> None:
    """Write the world in bf16, in the folders of the released one, with a copy of its tokenizer."""
    world = folder / WORLD
    settings = {**write_settings(transformer.config), **sizes.FLOW_SETTINGS}
    export_transformer(released_tensors(transformer), settings, world)
    export_reason1(text, folder / TEXT_FOLDER)
    shutil.copytree(tokenizer_folder, world / "vae", dirs_exist_ok=True)
