"""What training minimises: reconstruction of tokenizers, next token, denoising of latents, flow.

Source: nvidia-cosmos/cosmos-predict1, `tokenizer/training/losses`, `autoregressive/training` and
`diffusion/training`; nvidia-cosmos/cosmos-predict2.5, `_src/predict2/models/video2world_model_
rectified_flow.py`. The numbers agree with them, except that no term is counted twice and that a
mask has its effect.

A reconstruction loss is a set of *terms*, each a weighted tensor with its elements not yet
reduced, so that one reduction can be chosen for all of them (`reconstruction_terms`, `total`).

Axes: B batch, C channels, T frames, H/W pixels, N images (a batch of B clips is N = B T images),
M windows of a clip, L positions of a sequence, V entries of the vocabulary.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldline.errors import CheckpointError
from worldline.sampling.edm import precondition
from worldline.sampling.flow import SHIFT, TIMESTEPS

# Images (N, 3, H, W) in [-1, 1] -> feature maps (N, C_k, H_k, W_k), one a layer.
Features = Callable[[Tensor], Sequence[Tensor]]

# Of relu1_2, relu2_2, relu3_3, relu4_3, relu5_3: inverse of each layer's usual size of difference.
LAYER_WEIGHTS = (1 / 2.6, 1 / 4.8, 1 / 3.7, 1 / 5.6, 10 / 1.5)


class Reduction(StrEnum):
    """How the elements of a term become one number; the values are the released recipes' words."""

    MEAN = "MEAN"  # over all elements
    SUM = "SUM"  # over all elements of a clip, mean over the batch
    SUM_PER_FRAME = "SUM_PER_FRAME"  # over all elements of a frame, mean over frames and batch


@dataclass(frozen=True)
class Schedule:
    """A weight that is constant between iterations: values[i] until boundaries[i], then the last.

    Attributes:
        boundaries: iterations, rising; at the boundary itself the next value already holds.
        values: as many as boundaries (the last one holds for ever), or one more.
    """

    boundaries: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values or len(self.values) - len(self.boundaries) not in (0, 1):
            raise ValueError(
                f"a schedule has as many values as boundaries, or one more; "
                f"got {len(self.values)} values and {len(self.boundaries)} boundaries"
            )
        if any(after < before for before, after in pairwise(self.boundaries)):
            raise ValueError(f"boundaries must rise, got {self.boundaries}")

    @classmethod
    def constant(cls, value: float) -> Schedule:
        return cls((), (value,))

    def at(self, iteration: int) -> float:
        return self.values[min(bisect_right(self.boundaries, iteration), len(self.values) - 1)]


class FeatureNetwork(nn.Module):
    """The convolutions of VGG16 (arXiv 1409.1556), tapped after the last of each of five stages.

    Widths are those of the tensors it is made from, so a small network has the same class.
    It is frozen: gradients pass through it to the image, none is kept for its weights.
    """

    stages = (2, 2, 3, 3, 3)  # convolutions in each; the picture is halved between stages
    multiple = 2 ** (len(stages) - 1)  # the last stage sees a picture this much smaller

    shift: Tensor
    scale: Tensor

    def __init__(self, widths: Sequence[int]) -> None:
        """`widths` holds the output channels of every convolution, in order."""
        super().__init__()
        if len(widths) != sum(self.stages):
            raise ValueError(f"expected {sum(self.stages)} widths, got {len(widths)}")
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in pairwise((3, *widths))
        )
        # From [-1, 1] to the mean and deviation of the pictures that VGG16 was trained on.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]), persistent=False)
        self.requires_grad_(False)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> FeatureNetwork:
        """Build the network from a file's tensors.

        Args:
            tensors: names as in the perceptual-loss files (`slice1.0.weight`) or as in
                torchvision's VGG16 (`features.0.weight`, whose `classifier.*` is not used).

        Raises:
            CheckpointError: a tensor is missing, unknown, or of a shape that does not fit.
        """
        tensors = {k: v for k, v in tensors.items() if not k.startswith("classifier.")}
        names = _convolution_names(
            "features.{index}" if "features.0.weight" in tensors else "slice{stage}.{index}"
        )
        expected = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
        missing, unknown = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
        if missing or unknown:
            raise CheckpointError(
                "not the convolutions of a VGG16: "
                + "; ".join(
                    f"{word} {', '.join(some)}"
                    for word, some in (("missing", missing), ("unknown", unknown))
                    if some
                )
            )
        channels = 3
        for name in names:
            have = tuple(tensors[f"{name}.weight"].shape)
            if len(have) != 4 or have[0] == 0 or have[1:] != (channels, 3, 3):
                raise CheckpointError(
                    f"{name}.weight has shape {have}, expected (any, {channels}, 3, 3)"
                )
            channels = have[0]
            if (have_bias := tuple(tensors[f"{name}.bias"].shape)) != (channels,):
                raise CheckpointError(f"{name}.bias has shape {have_bias}, expected ({channels},)")
        network = cls([tensors[f"{name}.weight"].shape[0] for name in names])
        network.load_state_dict(
            {
                f"convolutions.{i}.{kind}": tensors[f"{name}.{kind}"]
                for i, name in enumerate(names)
                for kind in ("weight", "bias")
            }
        )
        return network

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return five feature maps (N, C_k, H / 2^k, W / 2^k), k = 0 .. 4, of one dtype.

        Args:
            images: (N, 3, H, W) in [-1, 1]; H and W at least 16.
        """
        if min(images.shape[-2:]) < self.multiple:
            raise ValueError(
                f"the feature network needs pictures of at least {self.multiple} x "
                f"{self.multiple} pixels, got {images.shape[-2]} x {images.shape[-1]}"
            )
        x = (images - self.shift[:, None, None]) / self.scale[:, None, None]
        x = x.to(self.dtype)
        convolutions = iter(self.convolutions)
        features = []
        for stage, count in enumerate(self.stages):
            if stage > 0:
                x = F.max_pool2d(x, 2)
            for _ in range(count):
                x = next(convolutions)(x).relu()
            features.append(x)
        return features


def _convolution_names(pattern: str) -> list[str]:
    """Name the convolutions as in a flat list of convolution, ReLU, ..., pooling, convolution."""
    names, index = [], 0
    for stage, count in enumerate(FeatureNetwork.stages, start=1):
        for _ in range(count):
            names.append(pattern.format(stage=stage, index=index))
            index += 2  # a ReLU follows each
        index += 1  # the pooling
    return names


def color_distance(target: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the absolute difference of every element, float32."""
    return (target.float() - reconstruction.float()).abs()  # float32: bf16 has steps of 1/256


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return the divergence of N(mean, exp(logvar)) from N(0, 1), in nats, element by element."""
    mean, logvar = mean.float(), logvar.float()  # float32: exp(logvar) - 1 - logvar cancels
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


def perceptual_distance(
    target: Sequence[Tensor], reconstruction: Sequence[Tensor], layer_weights: Sequence[float]
) -> Tensor:
    """Return, of each image, the weighted sum over layers of the mean absolute difference.

    Raw features, unlike LPIPS (arXiv 1801.03924): no channel is normalised, none is weighted.

    Args:
        target: feature maps (N, C_k, H_k, W_k), one a layer.
        reconstruction: the same of the reconstruction.
        layer_weights: one a layer.

    Returns:
        (N,) float32.
    """
    layers = [
        weight * (x.float() - y.float()).abs().mean((1, 2, 3))  # float32: small differences
        for x, y, weight in zip(target, reconstruction, layer_weights, strict=True)
    ]
    return torch.stack(layers).sum(0)


def gram_distance(
    target: Sequence[Tensor],
    reconstruction: Sequence[Tensor],
    layer_weights: Sequence[float],
    batch: int,
) -> Tensor:
    """Return, of each clip, the weighted sum over layers of the Gram matrices' squared distance.

    A clip has one Gram matrix, over all its frames; an image is a clip of one frame.

    Args:
        target: feature maps (B T, C_k, H_k, W_k), frames of a clip beside each other.
        reconstruction: the same of the reconstruction.
        layer_weights: one a layer.
        batch: B, the number of clips.

    Returns:
        (B,) float32.
    """
    layers = [
        weight * (_gram(x, batch) - _gram(y, batch)).square().mean((1, 2))
        for x, y, weight in zip(target, reconstruction, layer_weights, strict=True)
    ]
    return torch.stack(layers).sum(0)


def _gram(features: Tensor, batch: int) -> Tensor:
    """Return (B, C, C): mean over frames and pixels of the products of two channels."""
    x = features.float()  # float32: squares of differences of long sums
    x = x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2)  # (B, C, T H W)
    with torch.autocast(x.device.type, enabled=False):
        return x @ x.transpose(1, 2) / x.shape[2]


def split_windows(video: Tensor, num_frames: int, step: int) -> Tensor:
    """Cut clips into windows of `num_frames`, one every `step` frames.

    Args:
        video: (B, C, T, H, W). Frames after the last whole window are in none.
        num_frames: length of a window, at most T.
        step: distance of neighbouring windows' first frames.

    Returns:
        (B M, C, num_frames, H, W), windows of a clip beside each other; a copy.
    """
    if not 1 <= num_frames <= video.shape[2]:
        raise ValueError(f"a clip of {video.shape[2]} frames has no window of {num_frames}")
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}")
    windows = video.unfold(2, num_frames, step)  # (B, C, M, H, W, num_frames)
    return windows.permute(0, 2, 1, 5, 3, 4).flatten(0, 1)


def join_windows(windows: Tensor, num_windows: int, step: int) -> Tensor:
    """Undo `split_windows`: a frame is the mean over the windows that hold it.

    Args:
        windows: (B M, C, F, H, W), as `split_windows` orders them.
        num_windows: M.
        step: distance of neighbouring windows' first frames, at most F.

    Returns:
        (B, C, F + (M - 1) step, H, W).
    """
    windows = windows.unflatten(0, (-1, num_windows))  # (B, M, C, F, H, W)
    batch, _, channels, num_frames, height, width = windows.shape
    if not 1 <= step <= num_frames:
        raise ValueError(f"windows of {num_frames} frames leave gaps at a step of {step}")
    length = num_frames + (num_windows - 1) * step
    joined = windows.new_zeros(batch, channels, length, height, width)
    holders = windows.new_zeros(length)
    for i, window in enumerate(windows.unbind(1)):
        joined[:, :, i * step : i * step + num_frames] += window
        holders[i * step : i * step + num_frames] += 1
    return joined / holders[:, None, None]


def consistency_distance(windows: Tensor, num_windows: int, step: int) -> Tensor:
    """Return the mean absolute difference of neighbouring windows where they overlap, float32.

    Args:
        windows: (B M, C, F, H, W), pixels or latents, as `split_windows` orders them.
        num_windows: M; of a single window the distance is 0.
        step: distance of neighbouring windows' first frames (or latent frames), below F.
    """
    windows = windows.float().unflatten(0, (-1, num_windows))  # float32: small differences
    num_frames = windows.shape[3]
    if not 1 <= step < num_frames:
        raise ValueError(f"windows of {num_frames} frames do not overlap at a step of {step}")
    if num_windows == 1:
        return windows.sum() * 0  # the mean of no difference, kept in the graph
    return (windows[:, :-1, :, step:] - windows[:, 1:, :, :-step]).abs().mean()


def latent_consistency_distance(
    latents: Tensor, windows: Tensor, num_windows: int, step: int
) -> Tensor:
    """Return `consistency_distance` of latents, scaled by the numbers that a latent stands for.

    Args:
        latents: (B M, C', F', H', W') of the windows.
        windows: (B M, C, F, H, W) pixels; read for their shape.
        num_windows: M.
        step: in pixel frames, as for `split_windows`; a multiple of F // F'.
    """
    _, channels, num_frames, height, width = windows.shape
    _, latent_channels, latent_frames, latent_height, latent_width = latents.shape
    frames = num_frames // latent_frames
    if step % frames:
        raise ValueError(f"a step of {step} frames is not whole latent frames of {frames} frames")
    pixels = (height // latent_height) * (width // latent_width)
    distance = consistency_distance(latents, num_windows, step // frames)
    return distance * (channels * frames * pixels / latent_channels)


@dataclass(frozen=True, kw_only=True)
class ReconstructionObjective:
    """The terms of a tokenizer's loss and their weights; a term that is None is not computed.

    Attributes:
        color: absolute difference of pixels.
        perceptual: difference of features; needs a feature network.
        gram: difference of the features' Gram matrices; needs a feature network.
        kl: of a variational tokenizer; without effect where no posterior is given.
        consistency: difference of overlapping windows; without effect where none are given.
        consistency_step: distance of neighbouring windows in frames.
        layer_weights: of the feature network's layers.
    """

    color: Schedule | None = Schedule((), (1.0,))
    perceptual: Schedule | None = None
    gram: Schedule | None = None
    kl: Schedule | None = None
    consistency: Schedule | None = None
    consistency_step: int = 1
    layer_weights: tuple[float, ...] = LAYER_WEIGHTS


def reconstruction_terms(
    objective: ReconstructionObjective,
    target: Tensor,
    reconstruction: Tensor,
    iteration: int,
    *,
    features: Features | None = None,
    posterior: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    windows: Tensor | None = None,
    window_latents: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the weighted terms at an iteration, not yet reduced, all float32.

    A term whose weight is 0 at this iteration is zeros, and its network is not run.

    Args:
        objective: which terms, and their weights.
        target: (B, 3, T, H, W) or images (B, 3, H, W), in [-1, 1].
        reconstruction: of the same shape.
        iteration: from 0, for the schedules.
        features: the feature network, for the perceptual and the Gram term.
        posterior: mean and log variance of the latents, of one shape, for the KL term.
        mask: of `target`'s shape, or with 1 channel: weight of every pixel, 0 where it must not
            count. Features take it by nearest neighbour. Means stay over all elements.
        windows: (B M, 3, F, H, W), the windows' reconstructions, for the consistency term.
        window_latents: (B M, C', F', H', W'), for the same of latents.

    Returns:
        Of `color` and `perceptual`, `target`'s shape; of `gram`, the same with T = 1; of `kl`,
        the latents' shape; of `frame_consistency` and `latent_consistency`, ().
    """
    if target.shape != reconstruction.shape:
        raise ValueError(
            f"target and reconstruction differ in shape: {tuple(target.shape)} and "
            f"{tuple(reconstruction.shape)}"
        )
    terms: dict[str, Tensor] = {}
    if objective.color is not None:
        distance = color_distance(target, reconstruction)
        terms["color"] = objective.color.at(iteration) * (
            distance if mask is None else mask * distance
        )
    terms |= _feature_terms(objective, target, reconstruction, iteration, features, mask)
    if objective.kl is not None and posterior is not None:
        terms["kl"] = objective.kl.at(iteration) * kl_divergence(*posterior)
    if objective.consistency is not None and windows is not None:
        weight, step = objective.consistency.at(iteration), objective.consistency_step
        num_windows = windows.shape[0] // target.shape[0]
        terms["frame_consistency"] = weight * consistency_distance(windows, num_windows, step)
        if window_latents is not None:
            terms["latent_consistency"] = weight * latent_consistency_distance(
                window_latents, windows, num_windows, step
            )
    return terms


def _feature_terms(
    objective: ReconstructionObjective,
    target: Tensor,
    reconstruction: Tensor,
    iteration: int,
    features: Features | None,
    mask: Tensor | None,
) -> dict[str, Tensor]:
    schedules = {"perceptual": objective.perceptual, "gram": objective.gram}
    weights = {
        k: schedule.at(iteration) for k, schedule in schedules.items() if schedule is not None
    }
    if not weights:
        return {}
    if features is None:
        raise ValueError(f"the {' and '.join(weights)} term needs a feature network")
    batch = target.shape[0]
    single = (1,) * (target.ndim - 2)  # one element for all frames and pixels
    values = {k: target.new_zeros((batch, 1, *single), dtype=torch.float32) for k in weights}
    if any(weights.values()):
        x, y = (list(features(_images(video))) for video in (target, reconstruction))
        if mask is not None:
            pixels = _images(mask)[:, :1].to(x[0].dtype)
            masks = [F.interpolate(pixels, layer.shape[-2:]) for layer in x]
            x = [layer * mask for layer, mask in zip(x, masks, strict=True)]
            y = [layer * mask for layer, mask in zip(y, masks, strict=True)]
        if weights.get("perceptual"):
            distance = perceptual_distance(x, y, objective.layer_weights)  # (B T,)
            distance = distance.reshape(batch, 1, *target.shape[2:-2], 1, 1)  # images have no T
            values["perceptual"] = weights["perceptual"] * distance
        if weights.get("gram"):
            distance = gram_distance(x, y, objective.layer_weights, batch)
            values["gram"] = weights["gram"] * distance.reshape(batch, 1, *single)
    # Spread over the pixels, so that a sum weighs these terms as it weighs the colour term.
    shapes = {
        "perceptual": target.shape,
        "gram": (*target.shape[:2], *single[:-2], *target.shape[-2:]),
    }
    return {k: value.expand(shapes[k]) for k, value in values.items()}


def _images(video: Tensor) -> Tensor:
    """Return the frames of clips (B, C, T, H, W) as (B T, C, H, W); images as they are."""
    return video if video.ndim == 4 else video.transpose(1, 2).flatten(0, 1)


def reduce(term: Tensor, reduction: Reduction) -> Tensor:
    """Return one number of a term: (B, C, T, H, W), (B, C, H, W), or () which stays as it is."""
    reduction = Reduction(reduction)  # refuses other words from a file
    if term.ndim == 0:
        return term
    if reduction is Reduction.MEAN:
        return term.mean()
    count = term.shape[0]
    if reduction is Reduction.SUM_PER_FRAME and term.ndim == 5:
        count *= term.shape[2]  # the term's own: latent frames for KL, 1 for Gram
    return term.sum() / count


def total(terms: Mapping[str, Tensor], reduction: Reduction = Reduction.MEAN) -> Tensor:
    """Return the loss: the sum of the reduced terms, each counted once.

    The reference adds its last term, video consistency, a second time; its weight of 0.01 is
    0.02 here.
    """
    if not terms:
        raise ValueError("no term to sum: every term of the objective is off")
    return torch.stack([reduce(term, reduction) for term in terms.values()]).sum()


@dataclass(frozen=True)
class NextTokenLoss:
    """Loss of a batch of sequences, float32 tensors of shape ().

    Attributes:
        cross_entropy: mean over the counted labels, in nats.
        z: its coefficient times the mean of log(sum(exp(logits)))^2 over all positions.
    """

    cross_entropy: Tensor
    z: Tensor

    @property
    def total(self) -> Tensor:
        return self.cross_entropy + self.z


def next_token_labels(
    tokens: Tensor, ignore_first_num_tokens: int = 0, ignore_index: int = -100
) -> Tensor:
    """Return what every position but the last has to predict.

    Args:
        tokens: (B, L) ids.
        ignore_first_num_tokens: labels at the start of every sequence that do not count. With
            h w t - 1 the first t latent frames are given, and the next frame is predicted whole.
        ignore_index: what stands in place of a label that does not count.

    Returns:
        (B, L - 1) int64.
    """
    num_labels = tokens.shape[1] - 1
    if not 0 <= ignore_first_num_tokens < num_labels:
        raise ValueError(
            f"cannot ignore the first {ignore_first_num_tokens} of {num_labels} labels: "
            f"at least one must count"
        )
    labels = tokens[:, 1:].to(torch.int64, copy=True)
    labels[:, :ignore_first_num_tokens] = ignore_index
    return labels


def next_token_loss(
    logits: Tensor, labels: Tensor, *, z_coefficient: float = 0.0, ignore_index: int = -100
) -> NextTokenLoss:
    """Return the cross entropy of the labels, and the z-loss that keeps logits near 0.

    Args:
        logits: (B, L - 1, V), any floating dtype: of all positions but the last.
        labels: (B, L - 1), of `next_token_labels`; at least one counts.
        z_coefficient: 1e-4 in the released recipes. This loss (arXiv 2204.02311, section 5) is
            taken at every position, also where the label does not count.
        ignore_index: marks labels that do not count.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits of {tuple(logits.shape[:-1])} positions do not fit labels of "
            f"{tuple(labels.shape)}; leave out the logits of the last position"
        )
    logits = logits.float()  # float32: in bf16 a loss near 7 has steps of 0.03
    normalizer = logits.logsumexp(-1)
    counted = labels != ignore_index
    chosen = logits.gather(-1, labels.where(counted, 0)[..., None])[..., 0]
    surprise = (normalizer - chosen).where(counted, 0)
    return NextTokenLoss(
        cross_entropy=surprise.sum() / counted.sum(),
        z=z_coefficient * normalizer.square().mean(),
    )


class Noised(NamedTuple):
    """What a network is given of clean latents.

    Attributes:
        latents: (B, C, T, H, W), float32; of EDM, multiplied by the factor of its noise level.
        mask: (B, 1, T, H, W), 1 on frames that are known.
    """

    latents: Tensor
    mask: Tensor


def noised_latents(
    latents: Tensor,
    noise: Tensor,
    sigma: Tensor,
    known: Tensor,
    *,
    known_noise: Tensor,
    known_sigma: Tensor,
) -> Noised:
    """Return the input of a network, as a sampler with given frames shows it.

    The first frames of a clip may be known: they carry noise of a level of their own, and appear
    multiplied by the factor of that level, whatever the level of the others.

    Args:
        latents: (B, C, T, H, W), clean, of standard deviation 0.5.
        noise: unit normal, in their shape.
        sigma: (B,) noise levels of the frames that are not known.
        known: (B,) number of latent frames that are known.
        known_noise: as `noise`, for the known frames.
        known_sigma: (B,) their noise levels.
    """
    mask = _marked(latents, known)

    def at(level: Tensor, drawn: Tensor) -> Tensor:
        return _wide(precondition(level.float()).scale) * (
            latents.float() + _wide(level) * drawn.float()
        )

    shown = torch.where(mask != 0, at(known_sigma, known_noise), at(sigma, noise))
    return Noised(shown, mask)


def denoising_loss(
    output: Tensor, latents: Tensor, noise: Tensor, sigma: Tensor, mask: Tensor
) -> Tensor:
    """Return, of each clip, w(sigma) |D - latents|^2, its mean over what is not known.

    With the weight w = (sigma^2 + sd^2) / (sigma sd)^2 of arXiv 2206.00364, section 5, this is
    the squared error of the network's own output, which is computed here: differences of D are
    below float32 at the lowest noise levels.

    Args:
        output: F, (B, C, T, H, W), any floating dtype.
        latents: clean, in its shape.
        noise: as given to `noised_latents`.
        sigma: (B,).
        mask: (B, 1, T, H, W), 1 on known frames, whose loss is not counted; some are not known.

    Returns:
        (B,) float32.
    """
    skip, out, _, _ = (_wide(factor) for factor in precondition(sigma.float()))
    latents = latents.float()
    noised = latents + _wide(sigma.float()) * noise.float()
    target = (latents - skip * noised) / out
    error = (output.float() - target).square() * (1 - mask)  # float32: a mean of many squares
    return error.mean((1, 2, 3, 4)) / (1 - mask).mean((1, 2, 3, 4))


def log_normal_sigmas(normal: Tensor, *, mean: float, deviation: float) -> Tensor:
    """Return noise levels exp(mean + deviation * normal), float32, of unit normal numbers."""
    return (mean + deviation * normal.float()).exp()


def flowed_latents(latents: Tensor, noise: Tensor, sigma: Tensor, known: Tensor) -> Noised:
    """Return (1 - sigma) latents + sigma noise, the input of a network that tells the velocity.

    The first frames of a clip may be known: they are shown clean, as a sampler shows them.

    Args:
        latents: (B, C, T, H, W), clean, about of unit deviation.
        noise: unit normal, in their shape.
        sigma: (B,) noise levels from 0 to 1.
        known: (B,) number of latent frames that are known.
    """
    latents, level = latents.float(), _wide(sigma.float())
    mask = _marked(latents, known)
    return Noised(torch.where(mask != 0, latents, latents.lerp(noise.float(), level)), mask)


def flow_loss(velocity: Tensor, latents: Tensor, noise: Tensor, mask: Tensor) -> Tensor:
    """Return, of each clip, |velocity - (noise - latents)|^2, its mean over all elements.

    Known frames have no error, and count: the more is given of a clip, the less it weighs.

    Args:
        velocity: (B, C, T, H, W), any floating dtype.
        latents: clean, in its shape.
        noise: as given to `flowed_latents`.
        mask: (B, 1, T, H, W), 1 on known frames.

    Returns:
        (B,) float32.
    """
    target = noise.float() - latents.float()  # float32: a mean of many squares
    return ((velocity.float() - target).square() * (1 - mask)).mean((1, 2, 3, 4))


def shifted_sigmas(normal: Tensor, *, shift: float = SHIFT, deviation: float = 1.0) -> Tensor:
    """Return noise levels from above 0 to 1, float32, of unit normal numbers.

    They are sigmoid(-deviation * normal), on a grid of 1/1000, moved towards noise by `shift` as
    the levels of a sampler are. Recipes of the released models have a deviation of 1.
    """
    place = (TIMESTEPS * torch.sigmoid(deviation * normal.float())).floor()
    level = 1 - place.clamp_max(TIMESTEPS - 1) / TIMESTEPS
    return shift * level / (1 + (shift - 1) * level)


def _marked(latents: Tensor, known: Tensor) -> Tensor:
    """Return (B, 1, T, H, W), float32: 1 on the first `known` (B,) frames of latents."""
    frames = torch.arange(latents.shape[2], device=latents.device)
    mask = (frames < known[:, None])[:, None, :, None, None]
    return mask.expand(-1, -1, -1, *latents.shape[3:]).float()


def _wide(values: Tensor) -> Tensor:
    """Return (B,) as (B, 1, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1, 1)
