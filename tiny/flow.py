"""Recipe of the tiny flow transformer, and of its text encoder with it."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from tiny import sizes
from tiny.denoiser import NUM_CONDITIONING, train_captioned
from tiny.encoders import export_reason1, new_reason1
from tiny.export import dit_settings, dit_tensors, draw_weights, export_network
from tiny.run import NEGATIVE_PROMPT, TOKENIZER, Run, recipe
from worldline.families.predict2_5.model import FlowDiT
from worldline.families.predict2_5.weights import open_network
from worldline.losses import condition_mask, flow_loss, flowed_latents, shifted_sigmas
from worldline.nn.rope import Rotation
from worldline.sampling.flow import TIMESTEPS
from worldline.text.reason1 import RELEASED as TEXT_FOLDER
from worldline.text.reason1 import Reason1Encoder, Reason1Files
from worldline.tokenizers.wan.weights import open_wan

WORLD = "Cosmos-Predict2.5-2B"
# Wider than the released recipes' 1: the last of 20 steps is at 0.2, which one draw in 600 would
# reach, too few for a short run.
_DEVIATION = 1.4


@recipe(
    TOKENIZER,
    NEGATIVE_PROMPT,
    click.option(
        "--conditioning",
        type=float,
        nargs=len(NUM_CONDITIONING),
        default=NUM_CONDITIONING,
        show_default=True,
        help="Shares of clips that are given 0, 1 or 2 latent frames.",
    ),
    click.option(
        "--often", multiple=True, help="Word for which captions that have it are drawn once more."
    ),
)
def flow(
    run: Run,
    tokenizer: Path,
    negative_prompt: tuple[str, ...],
    conditioning: tuple[float, ...],
    often: tuple[str, ...],
) -> None:
    """Train the flow transformer, and its Reason1 encoder with it, as `diffusion` does."""
    coder = open_wan(tokenizer).read(run.device, run.half)
    torch.manual_seed(run.seed)
    model = Flowing(FlowDiT(sizes.FLOW), new_reason1(sizes.REASON1, max_length=sizes.TEXT_LENGTH))
    draw_weights(model.transformer)
    if run.start:
        model.transformer = open_network(run.start / WORLD).read(run.device, torch.float32)
        model.text = Reason1Files.open(run.start / TEXT_FOLDER).read(run.device, torch.float32)
    model = model.requires_grad_(True).to(run.device)

    def export(folder: Path) -> None:
        settings = {**dit_settings(model.transformer.config), **sizes.FLOW_SETTINGS}
        export_network(dit_tensors(model.transformer), settings, folder / WORLD)
        export_reason1(model.text, folder / TEXT_FOLDER)
        shutil.copytree(tokenizer, folder / WORLD / "vae", dirs_exist_ok=True)

    blank = model.text.tokenize(["", *negative_prompt])
    levels = partial(shifted_sigmas, deviation=_DEVIATION)
    train_captioned(
        run,
        model,
        coder.encode,
        model.text.tokenize,
        blank,
        levels,
        export,
        conditioning=conditioning,
        often=often,
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
        known = condition_mask(latents, num_conditioning)
        noised = torch.where(known != 0, latents, flowed_latents(latents, noise, sigma))
        times = (TIMESTEPS * sigma).floor()  # of all frames alike, as in samplers
        velocity = self.transformer(
            noised,
            times[:, None],
            self.transformer.encode_context(self.text.embed(ids)),
            Rotation(self.cos, self.sin),
            condition_mask=known,
        )
        return flow_loss(velocity, latents, noise, known)
