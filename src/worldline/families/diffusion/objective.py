"""What post-training of the diffusion transformer minimises: weighted denoising error (EDM).

Source: nvidia-cosmos/cosmos-predict1, `model`, `model_image` and `extend_model` of `diffusion/
training/models`; arXiv 2206.00364, section 5; arXiv 2312.02696, section 2, for the uncertainty.
Axes: B batch, C channels, T/H/W latent grid, S rows of the text, E its width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from worldline.families.diffusion.family import complete, restore, sample_video
from worldline.families.diffusion.model import DiT, DiTConfig, Positions
from worldline.families.diffusion.request import DiffusionRequest
from worldline.families.diffusion.weights import settings_of
from worldline.family import Opened, Parts
from worldline.losses import condition_mask, denoising_loss, noised_latents
from worldline.nn.pieces import encode_stream
from worldline.nn.rope import Rotation
from worldline.request import Positive, Share
from worldline.sampling.edm import SIGMA_DATA, precondition
from worldline.sampling.solvers import finish, standard_noise
from worldline.shapes import LatentShape
from worldline.weights.checkpoint import Checkpoint, open_checkpoint
from worldline.weights.keymap import KeyMap
from worldline.weights.networks import Network

_FEATURES = 128


class Uncertainty(nn.Module):
    """Learned logarithm of the error's variance at a noise level, which weighs the loss.

    Random Fourier features of c_noise; only the last layer is trained. Its tensors are those that
    checkpoints name `logvar`.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, features: int = _FEATURES) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.empty(features))
        self.register_buffer("phases", torch.empty(features))
        self.weight = nn.Parameter(torch.empty(1, features))

    def forward(self, times: Tensor) -> Tensor:
        """(B,), float32, of c_noise (B,)."""
        waves = (times.float()[:, None] * self.frequencies + self.phases).cos()
        return (math.sqrt(2) * waves @ self.weight.float().T)[:, 0]


class Draws(NamedTuple):
    """Random numbers of a step.

    Attributes:
        text_kept: (B,), 0 where the prompt is dropped, else 1.
        sigma: (B,) noise levels.
        noise: unit normal, in the shape of the latents.
        num_conditioning: (B,) int64, latent frames that are given; 0 without Video2World.
        condition_sigma: (B,) noise levels of the frames that are given.
        condition_noise: their noise, in the shape of the latents.
    """

    text_kept: Tensor
    sigma: Tensor
    noise: Tensor
    num_conditioning: Tensor
    condition_sigma: Tensor
    condition_noise: Tensor


@dataclass(frozen=True, kw_only=True)
class DenoisingObjective:
    """Recipe of a step.

    Attributes:
        noise_factor: of all noise levels; the released Video2World recipe multiplies by the root
            of the latent frames it was made for, 4, whatever the clip's number.
        text_dropout: share of prompts that are dropped.
        most_conditioning: largest number of latent frames that are given; each up to it is drawn
            as often, one for a batch.
        scale: of the loss.
    """

    noise_factor: Positive = 1.0
    noise_mean: float = 0.0
    noise_deviation: Positive = 1.0
    text_dropout: Share = 0.0
    most_conditioning: Annotated[int, Field(ge=0)] = 0
    condition_mean: float = -3.0
    condition_deviation: Positive = 2.0
    scale: Positive = 1.0

    def levels(self, uniform: Tensor) -> Tensor:
        """Noise levels (B,), float32, of uniform numbers (B,) float64 in (0, 1)."""
        levels = log_normal(uniform, self.noise_mean, self.noise_deviation)
        return (levels * self.noise_factor).float()

    def condition_levels(self, uniform: Tensor) -> Tensor:
        """Noise levels of the frames that are given, as `levels`."""
        return log_normal(uniform, self.condition_mean, self.condition_deviation).float()

    def draw(self, latents: Tensor, generator: torch.Generator) -> Draws:
        """Random numbers for latents (B, C, T, H, W), on their device; made on the generator's."""
        count, device = len(latents), generator.device

        def uniform() -> Tensor:
            return torch.rand(count, generator=generator, device=device, dtype=torch.float64)

        def normal() -> Tensor:
            return torch.randn(latents.shape, generator=generator, device=device)

        most = min(self.most_conditioning, latents.shape[2] - 1)
        given = torch.randint(most + 1, (1,), generator=generator, device=device)
        draws = Draws(
            text_kept=(uniform() >= self.text_dropout).float(),
            sigma=self.levels(uniform()),
            noise=normal(),
            num_conditioning=given.expand(count),
            condition_sigma=self.condition_levels(uniform()),
            condition_noise=normal() if most else torch.zeros((), device=device),
        )
        return Draws(*(each.to(latents.device) for each in draws))

    def inputs(self, latents: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """What the network reads, (B, C, T, H, W) float32, and the mask of the frames given.

        Latents are clean, of standard deviation 0.5. Frames that are given have a little noise of
        their own.
        """
        mask = condition_mask(latents, draws.num_conditioning)
        noised = noised_latents(latents, draws.noise, draws.sigma)
        given = noised_latents(latents, draws.condition_noise, draws.condition_sigma)
        return torch.where(mask > 0, given, noised), mask

    def loss(
        self,
        network: DiT,
        uncertainty: Uncertainty | None,
        batch: tuple[Tensor, Tensor, Tensor | float | None, Tensor | None],
        draws: Draws,
    ) -> Tensor:
        """Loss of each clip (B,), float32; below 0 where the uncertainty is small.

        Args:
            network: float32 or bf16.
            uncertainty: None weighs all noise levels alike.
            batch: latents (B, C, T, H, W) as the tokenizer makes them; embeddings of prompts
                (B, S, E); frames a second, of all or (B,); mask (B, 1, h, w) of padding, or None.
            draws: of `draw`.
        """
        latents, text, fps, padding = batch
        latents = SIGMA_DATA * latents.float()
        x, mask = self.inputs(latents, draws)
        times = precondition(draws.sigma.float()).noise
        output = network(
            x,
            times,
            network.encode_context(text * draws.text_kept.to(text)[:, None, None]),
            make_positions(network, LatentShape(*latents.shape[2:]), fps),
            condition_mask=mask if network.config.condition_mask else None,
            padding_mask=padding,
        )
        error = denoising_loss(output, latents, draws.noise, draws.sigma, mask)
        error = error * (1 - mask).mean((1, 2, 3, 4))  # frames given have no error, and count
        if uncertainty is not None:
            log_variance = uncertainty(times)
            error = error * (-log_variance).exp() + log_variance
        return self.scale * error


class TrainingStep(nn.Module):
    """Loss of the clips of a batch, all of one grid.

    Attributes:
        recipe: of the step.
        uncertainty: trained with the network; None where it is left out, or another's.
    """

    BLOCKS = "blocks"
    RECIPE = DenoisingObjective

    def __init__(
        self,
        network: DiT,
        recipe: DenoisingObjective,
        grid: LatentShape,
        uncertainty: Uncertainty | None = None,
    ) -> None:
        super().__init__()
        network.config.tokens(grid)  # within its positions
        self.network, self.recipe, self.uncertainty = network, recipe, uncertainty

    def draw(self, batch: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        """Arguments of `forward`, of those that `make_batch` made."""
        return *batch, *self.recipe.draw(batch[0], generator)

    def forward(
        self, latents: Tensor, text: Tensor, fps: Tensor, *draws: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and no terms; see `DenoisingObjective.loss`, fps is (B,)."""
        batch = latents, text, fps, None
        loss = self.recipe.loss(self.network, self.uncertainty, batch, Draws(*draws))
        return loss.mean(), {}

    def predict(self, parts: Parts, latents: Tensor, text: Tensor, fps: Tensor) -> Tensor:
        """Latents (1, C, T, H, W) of a video of the prompt, by the model's own sampler.

        Arguments are those that `make_batch` made of one clip. It begins with the first frame where
        frames are given in training; the branch without a prompt is that of a dropped one.
        """
        given = int(self.recipe.most_conditioning > 0 and latents.shape[2] > 1)
        stated = {**parts.opened.defaults, "num_input_frames": given}
        request = complete(parts.opened, DiffusionRequest.parse(stated))
        request = request.model_copy(update={"fps": float(fps[0])})  # whatever videos have
        noise = standard_noise(request.seed, latents.shape).to(latents.device)
        known = SIGMA_DATA * latents[:, :, :given].float() if given else None
        prompts = text, torch.zeros_like(text)
        _, steps = sample_video(parts, request, self.network, noise, known, prompts)
        return finish(steps) / SIGMA_DATA


def recipe_of(config: DiTConfig) -> dict[str, Any]:
    """Fields of the released recipe in which models that are given frames differ.

    Source: nvidia-cosmos/cosmos-predict1 `diffusion/training/config/video2world`.
    """
    given = {"noise_factor": 4.0, "text_dropout": 0.2, "most_conditioning": 2}
    return given if config.condition_mask else {}


# files of a checkpoint: name, what it holds, precision; and what names the newest
MODEL_FILES = (
    ("iter_{step:09}_reg_model.pt", "weights", torch.bfloat16),
    ("iter_{step:09}_ema_model.pt", "average", torch.float32),
    ("iter_{step:09}.pt", "iteration", torch.bfloat16),
)
NEWEST = "iter_{step:09}.pt"
BESIDE = "pos_embedder.*"  # pattern of further names of files that are kept as they were
_UNCERTAINTY = {
    "frequencies": "logvar.0.freqs",
    "phases": "logvar.0.phases",
    "weight": "logvar.1.weight",
}


def make_step(
    model: DiT, recipe: DenoisingObjective, grid: LatentShape, network: Network[Any]
) -> TrainingStep:
    """A step of a model, whose files are those of `network`; they may hold the uncertainty."""
    return TrainingStep(model, recipe, grid, read_uncertainty(network.source))


def read_uncertainty(source: Checkpoint) -> Uncertainty | None:
    """The uncertainty in a file; None where there is none, as in diffusers' layout.

    The released trainer never sets its features in averages: the file of the weights beside these
    has them, and the layer that was trained on them.
    """
    path = source.path
    weights = path.with_name(path.name.replace("_ema_model.pt", "_reg_model.pt"))
    if weights != path and weights.is_file():
        source = open_checkpoint(weights)
    if not {*_UNCERTAINTY.values()} <= source.tensors.keys():
        return None
    tensors = {name: source.read(key).float() for name, key in _UNCERTAINTY.items()}
    uncertainty = Uncertainty(len(tensors["phases"]))
    uncertainty.load_state_dict(tensors)
    return uncertainty


def released_name(keys: KeyMap, name: str) -> str:
    """Name in files of a parameter or buffer of a step."""
    part, _, rest = name.partition(".")
    return _UNCERTAINTY[rest] if part == "uncertainty" else keys.released(rest)


def loss_bytes(config: DiTConfig, tokens: int, itemsize: int) -> int:
    """Bytes of the last layers: norm, what its vectors multiply, and gradients."""
    return 5 * tokens * config.width * itemsize


def settings(config: DiTConfig, opened: Opened) -> dict[str, Any]:
    """Content of config.json beside a checkpoint."""
    return {**opened.settings, **settings_of(config)}


@torch.no_grad()
def encode_clips(parts: Parts, video: Tensor) -> Tensor:
    """Latents (B, C, T, H, W), float32, of clips (B, 3, T, H, W) in [-1, 1]."""
    statistics = parts.opened["tokenizer"].statistics.rounded(parts.compute.dtype)
    latents = [
        torch.cat([*encode_stream(parts.tokenizer.module, [clip])], dim=2)
        for clip in video.to(parts.device, parts.compute.dtype).split(1)
    ]
    # statistics of a clip's first frame, not of an image
    normal: Tensor = statistics.normalise(torch.cat(latents).float(), image=False)
    return normal


def to_tokenizer(parts: Parts, latents: Tensor) -> Tensor:
    """What the tokenizer decodes, of latents (B, C, T, H, W) as `encode_clips` makes them."""
    return restore(parts, SIGMA_DATA * latents)


def make_batch(
    config: DiTConfig, latents: Tensor, text: Tensor | None, fps: Sequence[float]
) -> tuple[Tensor, ...]:
    """Latents (B, C, T, H, W), embeddings of prompts (B, S, E), frame rates (B,)."""
    assert text is not None, "a diffusion model reads a text"
    return latents, text, torch.tensor(fps)


def make_positions(network: DiT, grid: LatentShape, fps: Tensor | float | None) -> Positions:
    """Positions of clips of one frame rate, or of several, fps (B,): the rotation is (B, L, K)."""
    rates = {*fps.tolist()} if isinstance(fps, Tensor) else {fps}
    positions = {rate: network.make_positions(grid, rate) for rate in rates}
    if len(rates) == 1 or not isinstance(fps, Tensor):
        return positions[rates.pop()]
    each = [positions[rate] for rate in fps.tolist()]
    turns = zip(*(one.rotation for one in each), strict=True)
    return each[0]._replace(rotation=Rotation(*map(torch.stack, turns)))


def log_normal(uniform: Tensor, mean: float, deviation: float) -> Tensor:
    """exp(mean + deviation z), z normal of the quantiles `uniform`, in their precision."""
    return (mean + deviation * torch.special.ndtri(uniform)).exp()


def clean_latents(network_input: Tensor, output: Tensor, sigma: Tensor) -> Tensor:
    """The network's estimate of the clean latents, (B, C, T, H, W) float32."""
    skip, out, scale, _ = precondition(sigma.float().view(-1, 1, 1, 1, 1))
    return skip * network_input.float() / scale + out * output.float()
