"""Training of the tiny flow transformer, and of its text encoder with it."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from tiny import sizes
from tiny.denoiser import (
    EncodedClips,
    draw_clips,
    draw_noise,
    encode_clips,
    export_transformer,
    train_denoiser,
)
from tiny.run import Run, half_precision
from worldline.models.predict2_5_dit.model import FlowDiT
from worldline.models.predict2_5_dit.weights import open_flow_dit, released_tensors, write_settings
from worldline.nn.rope import Rotation
from worldline.sampling.flow import TIMESTEPS
from worldline.text.reason1 import KEYS as REASON1_KEYS
from worldline.text.reason1 import RELEASED as TEXT_FOLDER
from worldline.text.reason1 import Reason1Encoder, export_reason1, find_reason1, new_reason1
from worldline.tokenizers.wan.load import load_wan, open_wan
from worldline.train.losses import flow_loss, flowed_latents, shifted_sigmas
from worldline.weights.stream import load_into

WORLD = "Cosmos-Predict2.5-2B"
# Wider than the released recipes' 1: the last of 20 steps is at 0.2, which one draw in 600 would
# reach, too few for a short run.
_DEVIATION = 1.4


def train_flow(
    run: Run, tokenizer_folder: Path, start: Path | None, negative_prompts: tuple[str, ...]
) -> None:
    """Train the transformer and the text encoder on captioned clips."""
    batch, clips, device = run.batch or 256, run.clips or 80_000, run.device
    tokenizer = load_wan(open_wan(tokenizer_folder), device, half_precision(device))
    torch.manual_seed(run.seed)
    model = Flowing(FlowDiT(sizes.FLOW), new_reason1(sizes.REASON1, max_length=sizes.TEXT_LENGTH))
    model.transformer.reset_parameters()
    if start is not None:
        dit = open_flow_dit(start / WORLD, write_settings(sizes.FLOW))
        text = find_reason1(start / TEXT_FOLDER)
        load_into(model.transformer, dit.source, dit.keys, device=device, dtype=torch.float32)
        load_into(
            model.text.network, text.checkpoint, REASON1_KEYS, device=device, dtype=torch.float32
        )
        model.requires_grad_(True)
    model = model.to(device)

    def tokenize(texts: list[str]) -> tuple[Tensor, ...]:
        return (model.text.tokenize(texts),)

    pool = encode_clips(run, run.seeds(clips), run.workers, tokenizer.encode, tokenize)
    held_out = encode_clips(run, run.held_out(256, clips), 0, tokenizer.encode, tokenize)
    blank = tokenize(["", *negative_prompts])

    def draw(clips: EncodedClips, step: int) -> tuple[Tensor, ...]:
        latents, texts, num_conditioning, normal = draw_clips(run, clips, blank, step, batch)
        noise = draw_noise(run, step, *latents.shape)
        sigma = shifted_sigmas(normal, deviation=_DEVIATION)
        return latents, noise, *texts, sigma, num_conditioning

    train_denoiser(
        run,
        model,
        functools.partial(draw, pool),
        functools.partial(draw, held_out),
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
        self, latents: Tensor, noise: Tensor, ids: Tensor, sigma: Tensor, num_conditioning: Tensor
    ) -> Tensor:
        """Loss of every clip, (B,).

        latents: (B, C, t, h, w), clean. noise: in their shape. ids: (B, S), all of which count.
        sigma: (B,).
        """
        noised, conditioning = flowed_latents(latents, noise, sigma, num_conditioning)
        times = (TIMESTEPS * sigma).floor()  # of all frames alike, as in samplers
        velocity = self.transformer(
            noised,
            times[:, None],
            self.transformer.encode_context(self.text.embed(ids)),
            Rotation(self.cos, self.sin),
            condition_mask=conditioning,
        )
        return flow_loss(velocity, latents, noise, conditioning)


def export_flow(
    transformer: FlowDiT, text: Reason1Encoder, tokenizer_folder: Path, folder: Path
) -> None:
    """Write the world in bf16, in the folders of the released one, with a copy of its tokenizer."""
    world = folder / WORLD
    settings = {**write_settings(transformer.config), **sizes.FLOW_SETTINGS}
    export_transformer(released_tensors(transformer), settings, world)
    export_reason1(text, folder / TEXT_FOLDER)
    shutil.copytree(tokenizer_folder, world / "vae", dirs_exist_ok=True)
