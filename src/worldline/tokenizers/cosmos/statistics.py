"""Mean and standard deviation of latents, by which the diffusion models see them normalised.

Source: nvidia-cosmos/cosmos-predict1 `diffusion/module/pretrained_vae.py`. They are kept for every
channel and every latent frame of a clip: latent frame 0 holds one frame of video, the others eight.
Axes: B batch, C channels, t/h/w latent frames, rows, columns.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldline.errors import CheckpointError
from worldline.weights.read import open_checkpoint

CONFIG_FILE = "config.json"
_RELEASED_FRAMES = 16  # latent frames of 121 frames; the released files are flat


@dataclass(frozen=True, eq=False)
class LatentStatistics:
    """What is taken from latents, and what they are then divided by.

    Attributes:
        mean: (C, t), float32, on the CPU.
        std: (C, t), above 0.
        image_mean: (C,) of a video of one frame; None if the file of images is absent.
        image_std: (C,).
    """

    mean: Tensor
    std: Tensor
    image_mean: Tensor | None = None
    image_std: Tensor | None = None

    def __post_init__(self) -> None:
        pairs = [(self.mean, self.std, 2)]
        if self.image_mean is not None or self.image_std is not None:
            if self.image_mean is None or self.image_std is None:
                raise ValueError("statistics of images need both a mean and a deviation")
            pairs.append((self.image_mean, self.image_std, 1))
        for mean, std, axes in pairs:
            if mean.shape != std.shape or mean.dim() != axes or len(mean) != len(self.mean):
                raise ValueError(f"mean is {list(mean.shape)} and deviation {list(std.shape)}")
            if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
                raise ValueError("a mean that is not finite, or a deviation that is not above 0")

    @property
    def frames(self) -> int:
        """The most latent frames they are defined for."""
        return self.mean.shape[1]

    def normalise(self, latents: Tensor, *, image: bool | None = None) -> Tensor:
        """Return (latents - mean) / std, computed in float32, in the dtype of `latents`.

        Args:
            latents: (B, C, t, h, w), from the first latent frame of a clip.
            image: take the statistics of images, where there are any; by default if t is 1. The
                first latent frame of a longer clip, alone, needs False.

        Raises:
            ValueError: more latent frames than `frames`, or other channels.
        """
        mean, std = self._of(latents, image)
        return ((latents.float() - mean) / std).to(latents.dtype)

    def denormalise(self, latents: Tensor, *, image: bool | None = None) -> Tensor:
        """Undo `normalise`."""
        mean, std = self._of(latents, image)
        return torch.addcmul(mean, latents.float(), std).to(latents.dtype)

    def _of(self, latents: Tensor, image: bool | None) -> tuple[Tensor, Tensor]:
        channels, frames = latents.shape[1:3]
        if channels != len(self.mean):
            raise ValueError(f"latents of {channels} channels, statistics of {len(self.mean)}")
        mean, std = self.mean, self.std
        if image is None:
            image = frames == 1
        if image and self.image_mean is not None and self.image_std is not None:
            mean, std = self.image_mean[:, None], self.image_std[:, None]
        if frames > mean.shape[1]:
            raise ValueError(
                f"{frames} latent frames, but their statistics are of {mean.shape[1]} alone"
            )
        return (
            mean[:, :frames, None, None].to(latents.device),
            std[:, :frames, None, None].to(latents.device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return what `mean_std.safetensors` holds."""
        named = {
            "mean": self.mean,
            "std": self.std,
            "image_mean": self.image_mean,
            "image_std": self.image_std,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def identity(cls, channels: int, frames: int = _RELEASED_FRAMES) -> LatentStatistics:
        """Return statistics that change nothing."""
        return cls(torch.zeros(channels, frames), torch.ones(channels, frames))


def read_statistics(folder: Path) -> LatentStatistics | None:
    """Return the statistics that lie in a tokenizer's folder, None if there are none.

    Args:
        folder: with `mean_std.pt` and perhaps `image_mean_std.pt`, with `mean_std.safetensors`, or
            one of diffusers (a model's or that of its `vae`), whose `config.json` holds them.

    Raises:
        CheckpointError: a file is damaged, or its content is not a mean and a deviation.
    """
    folder = Path(folder)
    released, ours = folder / "mean_std.pt", folder / "mean_std.safetensors"
    vae = find_vae(folder)
    if released.exists():
        tensors = _read_pair(released, "")
        if (folder / "image_mean_std.pt").exists():
            tensors |= _read_pair(folder / "image_mean_std.pt", "image_")
        return _checked(released, tensors)
    if ours.exists():
        source = open_checkpoint(ours)
        known = source.tensors.keys() & {"mean", "std", "image_mean", "image_std"}
        return _checked(ours, {name: source.read(name) for name in known})
    if vae is not None:
        settings = read_json(vae / CONFIG_FILE)
        tensors = {}
        for name, key in (("mean", "latents_mean"), ("std", "latents_std")):
            if settings.get(key) is None:
                continue
            try:
                flat = torch.tensor(settings[key], dtype=torch.float32)
                tensors[name] = flat.view(int(settings["latent_channels"]), -1)
            except (TypeError, ValueError, KeyError, RuntimeError) as error:
                raise CheckpointError(f"{vae / CONFIG_FILE}: {key}: {error}") from error
        return _checked(vae / CONFIG_FILE, tensors) if tensors else None
    return None


def find_vae(folder: Path) -> Path | None:
    """Return the folder of a diffusers autoencoder: `folder`, its `vae`, or None if neither is.

    Raises:
        CheckpointError: a `config.json` beside weights of diffusers is damaged.
    """
    for candidate in (folder, folder / "vae"):
        path = candidate / CONFIG_FILE
        if not path.is_file():
            continue
        try:
            kind = read_json(path).get("_class_name")
        except CheckpointError:
            if any(candidate.glob("diffusion_pytorch_model*")):
                raise
            continue  # that of a released folder, which nothing reads
        if isinstance(kind, str) and kind.startswith("Autoencoder"):
            return candidate
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: it cannot be read, or is no object.
    """
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return settings


def _read_pair(path: Path, prefix: str) -> dict[str, Tensor]:
    """A saved pair of tensors; those of clips are flat, channel slowest."""
    source = open_checkpoint(path)
    if source.tensors.keys() != {"0", "1"}:
        held = ", ".join(sorted(source.tensors)[:4])
        raise CheckpointError(f"{path}: a mean and a deviation are expected; it holds {held}")
    pair = {}
    for name, number in (("mean", "0"), ("std", "1")):
        tensor = source.read(number)
        if prefix:
            tensor = tensor.flatten()
        elif tensor.numel() % _RELEASED_FRAMES == 0:
            tensor = tensor.reshape(-1, _RELEASED_FRAMES)
        pair[prefix + name] = tensor
    return pair


def _checked(path: Path, tensors: dict[str, Tensor]) -> LatentStatistics:
    missing = {"mean", "std"} - tensors.keys()
    if missing:
        raise CheckpointError(f"{path} holds no {' and no '.join(sorted(missing))}")
    try:
        # float32 and copies: a mapped file may go away
        return LatentStatistics(**{name: t.float().clone() for name, t in tensors.items()})
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
