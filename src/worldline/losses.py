"""Training losses: tokenizer reconstruction, next token, EDM denoising, rectified flow.

Source: nvidia-cosmos/cosmos-predict1, `tokenizer/training/losses`, `autoregressive/training` and
`diffusion/training`; nvidia-cosmos/cosmos-predict2.5, `_src/predict2/models/video2world_model_
rectified_flow.py`. The numbers agree with them, except that no term is counted twice.

A reconstruction loss is a set of *terms*, each a weighted tensor with its elements not yet
reduced, so that one reduction serves all of them (`reconstruction_terms`, `total`).

Axes: B batch, C channels, T frames, H/W pixels, N images (a batch of B clips is N = B T images),
M windows of a clip, L positions of a sequence, V vocabulary.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldline.errors import CheckpointError
from worldline.sampling.edm import precondition
from worldline.sampling.flow import SHIFT, TIMESTEPS

# images (N, 3, H, W) in [-1, 1] -> feature maps (N, C_k, H_k, W_k), one a layer
Features = Callable[[Tensor], Sequence[Tensor]]

# relu1_2, relu2_2, relu3_3, relu4_3, relu5_3: inverse of each layer's usual size of difference
LAYER_WEIGHTS = (1 / 2.6, 1 / 4.8, 1 / 3.7, 1 / 5.6, 10 / 1.5)
# places of VGG16's convolutions in torchvision's `features`, by stage
_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
IGNORED = -100  # a label that does not count


class Reduction(StrEnum):
    """How the elements of a term become one number; the values are the released recipes' words."""

    MEAN = "MEAN"  # over all elements
    SUM = "SUM"  # over all elements of a clip, mean over the batch
    SUM_PER_FRAME = "SUM_PER_FRAME"  # over all elements of a frame, mean over frames and batch


@dataclass(frozen=True)
class Schedule:
    """Piecewise constant weight: values[i] before iteration boundaries[i], then the last value."""

    boundaries: tuple[int, ...]  # rising
    values: tuple[float, ...]  # as many, or one more

    def __post_init__(self) -> None:
        if not self.values or len(self.values) - len(self.boundaries) not in (0, 1):
            raise ValueError(f"boundaries {self.boundaries} need as many values, or one more")
        if list(self.boundaries) != sorted(self.boundaries):
            raise ValueError(f"boundaries must rise, got {self.boundaries}")

    def at(self, iteration: int) -> float:
        return self.values[min(bisect_right(self.boundaries, iteration), len(self.values) - 1)]


class FeatureNetwork(nn.Module):
    """Frozen convolutions of VGG16 (arXiv 1409.1556), tapped after each of five stages.

    Made from tensors by name, as in the perceptual-loss files (`slice1.0.weight`), or as in
    torchvision's VGG16 (`features.0.weight`, whose `classifier.*` is not used); their shapes give
    the widths. Gradients pass through it to the image.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        state = {
            re.sub(r"^(slice\d|features)", "convolutions", name): tensor
            for name, tensor in tensors.items()
            if not name.startswith("classifier.")
        }
        self.convolutions = nn.ModuleDict()
        width = 3
        for place in chain.from_iterable(_STAGES):
            weight = state.get(f"convolutions.{place}.weight", torch.empty(1))
            before, width = width, (*weight.shape, 1)[0]
            self.convolutions[str(place)] = nn.Conv2d(before, width, 3, padding=1)
        # from [-1, 1] to the mean and deviation of the pictures that VGG16 was trained on
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]), persistent=False)
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"not the convolutions of a VGG16: {error}") from error
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Five feature maps (N, C_k, H / 2^k, W / 2^k), k = 0 .. 4, in the network's dtype.

        Images are (N, 3, H, W) in [-1, 1].
        """
        height, width = images.shape[-2:]
        if min(height, width) < 16:  # the picture is halved between stages
            raise ValueError(f"pictures need at least 16 x 16 pixels, got {height} x {width}")
        x = (images - self.shift[:, None, None]) / self.scale[:, None, None]
        x = x.to(next(self.parameters()).dtype)
        features: list[Tensor] = []
        for places in _STAGES:
            if features:
                x = F.max_pool2d(x, 2)
            for place in places:
                x = self.convolutions[str(place)](x).relu()
            features.append(x)
        return features


def color_distance(target: Tensor, reconstruction: Tensor) -> Tensor:
    """Absolute difference of every element, float32."""
    return (target.float() - reconstruction.float()).abs()  # float32: bf16 has steps of 1/256


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Divergence of N(mean, exp(logvar)) from N(0, 1), in nats, element by element."""
    mean, logvar = mean.float(), logvar.float()  # float32: exp(logvar) - 1 - logvar cancels
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


def perceptual_distance(target: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean absolute difference of the features of each frame, (B, T) float32.

    Features are (B, T, C, H, W), raw, unlike in LPIPS (arXiv 1801.03924): no channel is normalised,
    none is weighted.
    """
    return (target.float() - reconstruction.float()).abs().mean((2, 3, 4))  # small numbers


def gram_distance(target: Tensor, reconstruction: Tensor) -> Tensor:
    """Squared distance of the Gram matrices of each clip, (B, 1) float32.

    Features are (B, T, C, H, W). A clip has one Gram matrix, over all its frames.
    """
    return (_gram(target) - _gram(reconstruction)).square().mean((1, 2))[:, None]


def _gram(features: Tensor) -> Tensor:
    """Gram matrices (B, C, C): mean over frames and pixels of the products of two channels."""
    x = features.float().transpose(1, 2).flatten(2)  # float32: differences of long sums
    with torch.autocast(x.device.type, enabled=False):
        return x @ x.transpose(1, 2) / x.shape[2]


def split_windows(video: Tensor, num_frames: int, step: int) -> Tensor:
    """Windows of a video (B, C, T, H, W), one every `step` frames: (B M, C, num_frames, H, W).

    A copy. Frames after the last whole window are in none.
    """
    windows = video.unfold(2, num_frames, step)  # (B, C, M, H, W, num_frames)
    return windows.permute(0, 2, 1, 5, 3, 4).flatten(0, 1)


def join_windows(windows: Tensor, num_windows: int, step: int) -> Tensor:
    """Inverse of `split_windows`, (B, C, F + (M - 1) step, H, W): frames are means over windows."""
    num_frames = windows.shape[2]
    if num_windows > 1 and step > num_frames:
        raise ValueError(f"windows of {num_frames} frames leave gaps at a step of {step}")
    joined = F.pad(windows[::num_windows], (0,) * 5 + ((num_windows - 1) * step,))
    counts = windows.new_zeros(joined.shape[2], 1, 1)
    counts[:num_frames] = 1
    for index in range(1, num_windows):
        place = slice(index * step, index * step + num_frames)
        joined[:, :, place] += windows[index::num_windows]
        counts[place] += 1
    return joined / counts


def consistency_distance(windows: Tensor, num_windows: int, step: int) -> Tensor:
    """Mean absolute difference of neighbouring windows where they overlap, float32, ().

    Windows are (B M, C, F, H, W), pixels or latents, as `split_windows` orders them.
    """
    windows = windows.float().unflatten(0, (-1, num_windows))  # float32: small differences
    num_frames = windows.shape[3]
    if not 1 <= step < num_frames:
        raise ValueError(f"windows of {num_frames} frames do not overlap at a step of {step}")
    if num_windows == 1:
        return windows.sum() * 0  # the mean of no difference, kept in the graph
    return (windows[:, :-1, :, step:] - windows[:, 1:, :, :-step]).abs().mean()


@dataclass(frozen=True, kw_only=True)
class ReconstructionObjective:
    """Terms of a tokenizer's loss and their weights; a term that is None is not computed."""

    color: Schedule | None = Schedule((), (1.0,))  # absolute difference of pixels
    perceptual: Schedule | None = None  # difference of features
    gram: Schedule | None = None  # difference of the features' Gram matrices
    kl: Schedule | None = None  # divergence of a variational tokenizer's posterior
    layer_weights: tuple[float, ...] = LAYER_WEIGHTS  # of the feature network


def reconstruction_terms(
    objective: ReconstructionObjective,
    target: Tensor,
    reconstruction: Tensor,
    iteration: int,
    *,
    features: Features | None = None,
    posterior: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Weighted terms of an iteration, not yet reduced, float32.

    `color` and `perceptual` have the shape of `target` (images are clips of one frame), `gram` the
    same with T = 1, `kl` that of the latents: a sum thus weighs all of them alike. Without weight,
    the feature network is not run.

    Args:
        objective: which terms, and their weights.
        target: (B, 3, T, H, W) or images (B, 3, H, W), in [-1, 1].
        reconstruction: of the same shape.
        iteration: from 0.
        features: the feature network, for the perceptual and the Gram term.
        posterior: mean and log variance of the latents, of one shape; None without `kl`.
    """
    if target.shape != reconstruction.shape:
        raise ValueError(f"shapes differ: {target.shape} and {reconstruction.shape}")
    if target.ndim == 4:
        target, reconstruction = target.unsqueeze(2), reconstruction.unsqueeze(2)
    terms: dict[str, Tensor] = {}
    if objective.color:
        terms["color"] = objective.color.at(iteration) * color_distance(target, reconstruction)
    layers: list[tuple[float, Tensor, Tensor]] = []
    for name, schedule, measure in (
        ("perceptual", objective.perceptual, perceptual_distance),
        ("gram", objective.gram, gram_distance),
    ):
        if schedule is None:
            continue
        if features is None:
            raise ValueError(f"the {name} term needs a feature network")
        if (weight := schedule.at(iteration)) and not layers:
            maps = [features(x.transpose(1, 2).flatten(0, 1)) for x in (target, reconstruction)]
            clips = [[x.unflatten(0, (len(target), -1)) for x in each] for each in maps]
            layers = list(zip(objective.layer_weights, *clips, strict=True))
        distance = torch.zeros(1, 1, device=target.device)
        for layer_weight, x, y in layers:
            distance = distance + weight * layer_weight * measure(x, y)
        terms[name] = distance[:, None, :, None, None].expand_as(target[:, :, : distance.shape[1]])
    if objective.kl and posterior:
        terms["kl"] = objective.kl.at(iteration) * kl_divergence(*posterior)
    return terms


def reduce(term: Tensor, reduction: Reduction) -> Tensor:
    """One number of a term (B, C, T, H, W) or (B, C, H, W); () stays as it is."""
    if reduction is Reduction.MEAN or term.ndim == 0:
        return term.mean()
    count = term.shape[0]
    if reduction is Reduction.SUM_PER_FRAME and term.ndim == 5:
        count *= term.shape[2]  # the term's own: latent frames for KL, 1 for Gram
    return term.sum() / count


def total(terms: Mapping[str, Tensor], reduction: Reduction = Reduction.MEAN) -> Tensor:
    """Sum of the reduced terms, each counted once.

    The reference adds its last term, video consistency, a second time; its weight of 0.01 is
    0.02 here.
    """
    if not terms:
        raise ValueError("no term to sum: every term of the objective is off")
    return torch.stack([reduce(term, reduction) for term in terms.values()]).sum()


def next_token_labels(tokens: Tensor, ignore_first_num_tokens: int) -> Tensor:
    """Labels (B, L - 1) int64 of tokens (B, L): the token after each position, or IGNORED.

    The first labels do not count, such as the tokens of conditioning frames but one.
    """
    num_labels = tokens.shape[1] - 1
    if not 0 <= ignore_first_num_tokens < num_labels:
        raise ValueError(f"cannot ignore first {ignore_first_num_tokens} of {num_labels} labels")
    labels = tokens[:, 1:].to(torch.int64, copy=True)
    labels[:, :ignore_first_num_tokens] = IGNORED
    return labels


def next_token_loss(logits: Tensor, labels: Tensor, *, z_coefficient: float = 0.0) -> Tensor:
    """Mean cross entropy of the labels that count, in nats, and the z-loss; float32, ().

    The z-loss (arXiv 2204.02311, section 5) keeps logits near 0: the mean of
    log(sum(exp(logits)))^2 over all positions, also those whose label does not count.

    Args:
        logits: (B, L - 1, V), any floating dtype: all positions but the last.
        labels: (B, L - 1), from `next_token_labels`; at least one counts.
        z_coefficient: weight of the z-loss; 1e-4 in the released recipes.
    """
    logits = logits.float()  # float32: in bf16 a loss near 7 has steps of 0.03
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    if z_coefficient:
        loss = loss + z_coefficient * logits.logsumexp(-1).square().mean()
    return loss


def condition_mask(latents: Tensor, num_conditioning: Tensor) -> Tensor:
    """Mask (B, 1, T, H, W), float32: 1 on the first `num_conditioning` (B,) frames."""
    frames = torch.arange(latents.shape[2], device=latents.device)
    mask = (frames < num_conditioning[:, None])[:, None, :, None, None]
    return mask.expand(-1, -1, -1, *latents.shape[3:]).float()


def noised_latents(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Noised and preconditioned latents, float32, as an EDM sampler passes them to a network.

    Latents (B, C, T, H, W) are clean, of standard deviation 0.5; noise is unit normal, in their
    shape; sigma (B,) are noise levels.
    """
    level = _wide(sigma.float())
    return precondition(level).scale * (latents.float() + level * noise.float())


def denoising_loss(
    output: Tensor, latents: Tensor, noise: Tensor, sigma: Tensor, mask: Tensor
) -> Tensor:
    """Mean over all but conditioning frames of w(sigma) |D - latents|^2, (B,) float32.

    With the weight w = (sigma^2 + sd^2) / (sigma sd)^2 of arXiv 2206.00364, section 5, this is
    the squared error of the network's own output, which is computed here: differences of D are
    below float32 at the lowest noise levels.

    Args:
        output: F, (B, C, T, H, W), any floating dtype.
        latents: clean, in its shape.
        noise: as passed to `noised_latents`.
        sigma: (B,).
        mask: (B, 1, T, H, W), 1 on conditioning frames; some are not.
    """
    level, latents = _wide(sigma.float()), latents.float()
    skip, out, _, _ = precondition(level)
    target = (latents - skip * (latents + level * noise.float())) / out
    error = (output.float() - target).square() * (1 - mask)  # float32: a mean of many squares
    return error.mean((1, 2, 3, 4)) / (1 - mask).mean((1, 2, 3, 4))


def log_normal_sigmas(normal: Tensor, *, mean: float, deviation: float) -> Tensor:
    """Noise levels exp(mean + deviation * normal), float32, from unit normal numbers."""
    return (mean + deviation * normal.float()).exp()


def flowed_latents(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) latents + sigma noise, float32: between data, at 0, and noise, at 1.

    Shapes are those of `noised_latents`; the latents have about unit deviation.
    """
    return latents.float().lerp(noise.float(), _wide(sigma.float()))


def flow_loss(velocity: Tensor, latents: Tensor, noise: Tensor, mask: Tensor) -> Tensor:
    """Mean of |velocity - (noise - latents)|^2 over all elements, (B,) float32.

    Shapes are those of `denoising_loss`. Conditioning frames have no error, and count: the more of
    them, the less a clip weighs.
    """
    target = noise.float() - latents.float()  # float32: a mean of many squares
    return ((velocity.float() - target).square() * (1 - mask)).mean((1, 2, 3, 4))


def shifted_sigmas(normal: Tensor, *, shift: float = SHIFT, deviation: float = 1.0) -> Tensor:
    """Noise levels in (0, 1], float32, from unit normal numbers.

    They are sigmoid(-deviation * normal) on a grid of 1/1000, moved towards noise by `shift` as
    the levels of a sampler are. The released recipes have a deviation of 1.
    """
    place = (TIMESTEPS * torch.sigmoid(deviation * normal.float())).floor()
    level = 1 - place.clamp_max(TIMESTEPS - 1) / TIMESTEPS
    return shift * level / (1 + (shift - 1) * level)


def _wide(values: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1, 1)
