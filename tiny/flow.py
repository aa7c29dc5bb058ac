"""Training of the tiny flow transformer, and of its text encoder with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from tiny import sizes
from tiny.denoiser import Batch, draw_noise, export_transformer, train_captioned
from tiny.export import dit_settings, dit_tensors, draw_weights
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
from worldline.families.predict2_5.weights import open_network
from worldline.nn.rope import Rotation
from worldline.sampling.flow import TIMESTEPS
from worldline.text.reason1 import KEYS as REASON1_KEYS
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
    run: Run, tokenizer_folder: Path, start: Path | None, negative_prompts: tuple[str, ...]
) -> None:
    """Train the transformer and the text encoder on captioned clips."""
    device = run.device
    tokenizer = load_wan(open_wan(tokenizer_folder), device, half_precision(device))
    torch.manual_seed(run.seed)
    model = Flowing(FlowDiT(sizes.FLOW), new_reason1(sizes.REASON1, max_length=sizes.TEXT_LENGTH))
    draw_weights(model.transformer)
    if start is not None:
        dit = open_network(start / WORLD, dit_settings(sizes.FLOW))
        load_into(model.transformer, dit.source, dit.keys, device=device, dtype=torch.float32)
        load_into(
            model.text.network, text.checkpoint, REASON1_KEYS, device=device, dtype=torch.float32
        )
        model.requires_grad_(True)
    model = model.to(device)

    def tokenize(texts: list[str]) -> tuple[Tensor, ...]:
        return (model.text.tokenize(texts),)

    def add_noise(step: int, clips: Batch) -> tuple[Tensor, ...]:
        noise = draw_noise(run, step, *clips.latents.shape)
        sigma = shifted_sigmas(clips.normal, deviation=_DEVIATION)
        return clips.latents, noise, *clips.texts, sigma, clips.num_conditioning

    def export(folder: Path) -> None:
        export_flow(model.transformer, model.text, tokenizer_folder, folder)

    blank = tokenize(["", *negative_prompts])
    train_captioned(run, model, tokenizer.encode, tokenize, blank, add_noise, export)


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
    settings = {**dit_settings(transformer.config), **sizes.FLOW_SETTINGS}
    export_transformer(dit_tensors(transformer), settings, world)
    export_reason1(text, folder / TEXT_FOLDER)
    shutil.copytree(tokenizer_folder, world / "vae", dirs_exist_ok=True)
