"""What post-training of the flow transformer minimises: error of the velocity.

Source: nvidia-cosmos/cosmos-predict2.5 `_src/predict2/models/video2world_model_rectified_flow.py`
and `schedulers/rectified_flow.py`; arXiv 2210.02747.
Axes: B batch, C channels, T/H/W latent grid, S rows of the text, F its features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from worldline.families.predict2_5.family import sample_window
from worldline.families.predict2_5.model import FlowDiT, FlowDiTConfig
from worldline.families.predict2_5.request import FlowRequest
from worldline.families.predict2_5.weights import settings_of
from worldline.family import Opened, Parts
from worldline.losses import condition_mask, flow_loss, flowed_latents, shifted_sigmas
from worldline.nn.pieces import encode_stream
from worldline.request import Share
from worldline.sampling.flow import SHIFT, TIMESTEPS
from worldline.sampling.solvers import finish, standard_noise
from worldline.shapes import LatentShape
from worldline.weights.keymap import KeyMap
from worldline.weights.networks import Network

HIGH_TIMESTEPS = (980.0, 1000.0)


class Draws(NamedTuple):
    """Random numbers of a step.

    Attributes:
        text_kept: (B,), 0 where the prompt is dropped, else 1.
        sigma: (B,) noise levels in (0, 1].
        noise: unit normal, in the shape of the latents.
        num_conditioning: (B,) int64, latent frames that are given.
    """

    text_kept: Tensor
    sigma: Tensor
    noise: Tensor
    num_conditioning: Tensor


def _some(shares: tuple[float, ...]) -> tuple[float, ...]:
    if not sum(shares):
        raise ValueError("one share at least is above 0")
    return shares


@dataclass(frozen=True, kw_only=True)
class FlowObjective:
    """Recipe of a step.

    Attributes:
        text_dropout: share of prompts that are dropped.
        conditioning: shares of clips of which 0, 1, 2, ... latent frames are given.
        high_share: share of clips whose noise level is one of the highest, drawn evenly.
    """

    text_dropout: Share = 0.2
    conditioning: Annotated[tuple[Share, ...], AfterValidator(_some)] = (0.5, 0.25, 0.25)
    high_share: Share = 0.0
    shift: Annotated[float, Field(ge=1)] = SHIFT

    def levels(self, normal: Tensor, chance: Tensor, choice: Tensor) -> Tensor:
        """Noise levels (B,), float32.

        Args:
            normal: (B,) unit normal.
            chance: (B,) in [0, 1); below `high_share` the level is one of the highest.
            choice: (B,) int64, which one.
        """
        high = high_levels(self.shift).to(normal.device)[choice]
        return torch.where(chance < self.high_share, high, shifted_sigmas(normal, shift=self.shift))

    def draw(self, latents: Tensor, generator: torch.Generator) -> Draws:
        """Random numbers for latents (B, C, T, H, W), on their device; made on the generator's."""
        count, device = len(latents), generator.device

        def uniform() -> Tensor:
            return torch.rand(count, generator=generator, device=device)

        kept = uniform() >= self.text_dropout
        frames = len(self.conditioning) if latents.shape[2] > 1 else 1  # an image has none to give
        shares = torch.tensor(self.conditioning[:frames], device=device)
        given = torch.multinomial(shares, count, replacement=True, generator=generator)
        noise = torch.randn(latents.shape, generator=generator, device=device)
        normal = torch.randn(count, generator=generator, device=device)
        chance, highest = uniform(), len(high_levels(self.shift))
        choice = torch.randint(highest, (count,), generator=generator, device=device)
        draws = Draws(kept.float(), self.levels(normal, chance, choice), noise, given)
        return Draws(*(each.to(latents.device) for each in draws))

    def inputs(self, latents: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """What the network reads, (B, C, T, H, W) float32, and the mask of the frames given."""
        mask = condition_mask(latents, draws.num_conditioning)
        noised = flowed_latents(latents, draws.noise, draws.sigma)
        return torch.where(mask > 0, latents.float(), noised), mask

    def loss(
        self, network: FlowDiT, batch: tuple[Tensor, Tensor, Tensor | None], draws: Draws
    ) -> Tensor:
        """Loss of each clip (B,), float32.

        Args:
            network: float32 or bf16.
            batch: latents (B, C, T, H, W) as the tokenizer makes them; features of prompts
                (B, S, F); mask (B, 1, h, w) of padding, None without.
            draws: of `draw`.
        """
        latents, text, padding = batch
        x, mask = self.inputs(latents, draws)
        velocity = network(
            x,
            TIMESTEPS * draws.sigma[:, None],
            network.encode_context(text * draws.text_kept.to(text)[:, None, None]),
            network.make_positions(LatentShape(*latents.shape[2:])),
            condition_mask=mask,
            padding_mask=padding,
        )
        return flow_loss(velocity, latents, draws.noise, mask)


class TrainingStep(nn.Module):
    """Loss of the clips of a batch, all of one grid.

    Attributes:
        recipe: of the step.
    """

    BLOCKS = "blocks"
    RECIPE = FlowObjective

    def __init__(self, network: FlowDiT, recipe: FlowObjective, grid: LatentShape) -> None:
        super().__init__()
        network.config.tokens(grid)  # within its positions
        self.network, self.recipe = network, recipe

    def draw(self, batch: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        """Arguments of `forward`, of those that `make_batch` made."""
        return *batch, *self.recipe.draw(batch[0], generator)

    def forward(
        self, latents: Tensor, text: Tensor, *draws: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and no terms; see `FlowObjective.loss`."""
        loss = self.recipe.loss(self.network, (latents, text, None), Draws(*draws))
        return loss.mean(), {}

    def predict(self, parts: Parts, latents: Tensor, text: Tensor) -> Tensor:
        """Latents (1, C, T, H, W) of a video of the prompt, by the model's own sampler.

        Arguments are those that `make_batch` made of one clip. It begins with the first frame where
        frames are given in training; the branch without a prompt is that of a dropped one.
        """
        request = FlowRequest.parse(parts.opened.defaults)
        noise = standard_noise(request.seed, latents.shape).to(latents.device)
        given = any(self.recipe.conditioning[1:]) and latents.shape[2] > 1
        known = latents[:, :, :1].float() if given else None
        prompts = text, torch.zeros_like(text)
        _, steps = sample_window(parts, request, self.network, noise, known, prompts)
        return finish(steps)


# files of a checkpoint: name, what it holds, precision; and what names the newest
MODEL_FILES = (
    ("iter_{step:09}/model.pt", "weights", torch.bfloat16),
    ("iter_{step:09}/model_ema_bf16.pt", "average", torch.bfloat16),
)
NEWEST = "iter_{step:09}"
BESIDE = "pos_embedder.*"  # pattern of further names of files that are kept as they were


def make_step(
    model: FlowDiT, recipe: FlowObjective, grid: LatentShape, network: Network[Any]
) -> TrainingStep:
    """A step of a model, whose files are those of `network`."""
    return TrainingStep(model, recipe, grid)


def released_name(keys: KeyMap, name: str) -> str:
    """Name in files of a parameter of a step."""
    return keys.released(name.removeprefix("network."))


def loss_bytes(config: FlowDiTConfig, tokens: int, itemsize: int) -> int:
    """Bytes of the last layers, in float32: norm, what its vectors multiply, and gradients."""
    return 5 * tokens * config.width * 4


def settings(config: FlowDiTConfig, opened: Opened) -> dict[str, Any]:
    """Content of config.json beside a checkpoint."""
    return {**opened.settings, **settings_of(config)}


@torch.no_grad()
def encode_clips(parts: Parts, video: Tensor) -> Tensor:
    """Latents (B, C, T, H, W), float32, of clips (B, 3, T, H, W) in [-1, 1]."""
    latents = [
        torch.cat([*encode_stream(parts.tokenizer.module, [clip])], dim=2)
        for clip in video.to(parts.device, parts.compute.dtype).split(1)
    ]
    return torch.cat(latents).float()


def to_tokenizer(parts: Parts, latents: Tensor) -> Tensor:
    """What the tokenizer decodes, of latents (B, C, T, H, W) as `encode_clips` makes them."""
    return latents


def make_batch(
    config: FlowDiTConfig, latents: Tensor, text: Tensor | None, fps: Sequence[float]
) -> tuple[Tensor, ...]:
    """Latents (B, C, T, H, W), and features of prompts (B, S, F)."""
    assert text is not None, "a flow model reads a text"
    return latents, text


def high_levels(shift: float = SHIFT) -> Tensor:
    """The highest noise levels of the released table of 1,000, falling from 1."""
    level = 1 - torch.arange(TIMESTEPS) / TIMESTEPS
    level = shift * level / (1 + (shift - 1) * level)
    low, high = HIGH_TIMESTEPS
    return level[(TIMESTEPS * level >= low) & (TIMESTEPS * level <= high)]
