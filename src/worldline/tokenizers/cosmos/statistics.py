"""Mean and standard deviation of latents, by which the diffusion models see them normalised.

Source: nvidia-cosmos/cosmos-predict1 `diffusion/module/pretrained_vae.py`. They are kept for every
channel and every latent frame of a clip: latent frame 0 holds one frame of video, the others eight.
Axes: B batch, C channels, t/h/w latent frames, rows, columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from worldline.errors import CheckpointError
from worldline.files import read_json
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


def read_statistics(folder: Path, latent_channels: int | None = None) -> LatentStatistics | None:
    """Return the statistics that lie in a tokenizer's folder, None if there are none.

    Args:
        folder: with `mean_std.pt` and perhaps `image_mean_std.pt`, with `mean_std.safetensors`, or
            one of diffusers (a model's or that of its `vae`), whose `config.json` holds them.
        latent_channels: of the tokenizer; statistics of others are refused. None where it is not
            known: released files are then taken to hold 16 latent frames.

    Raises:
        CheckpointError: a file is damaged, its content is not a mean and a deviation, or they are
            of latents with other channels.
    """
    folder = Path(folder)
    released, ours = folder / "mean_std.pt", folder / "mean_std.safetensors"
    vae = next(_vaes(folder), None)
    if released.exists():
        path, tensors = released, _read_pair(released, "", latent_channels)
        if (folder / "image_mean_std.pt").exists():
            tensors |= _read_pair(folder / "image_mean_std.pt", "image_", latent_channels)
    elif ours.exists():
        path, source = ours, open_checkpoint(ours)
        known = source.tensors.keys() & {"mean", "std", "image_mean", "image_std"}
        tensors = {name: source.read(name) for name in known}
    elif vae is not None:
        path, tensors = vae / CONFIG_FILE, {}
        settings = read_json(path)
        for name, key in (("mean", "latents_mean"), ("std", "latents_std")):
            if settings.get(key) is None:
                continue
            try:
                flat = torch.tensor(settings[key], dtype=torch.float32)
                tensors[name] = flat.view(int(settings["latent_channels"]), -1)
            except (TypeError, ValueError, KeyError, RuntimeError) as error:
                raise CheckpointError(f"{path}: {key}: {error}") from error
        if not tensors:
            return None
    else:
        return None
    statistics = _checked(path, tensors)
    if latent_channels not in (None, len(statistics.mean)):
        raise CheckpointError(
            f"{path} is of latents of {len(statistics.mean)} channels, but the tokenizer beside it "
            f"gives {latent_channels}: they do not belong together"
        )
    return statistics


def find_vae(folder: Path) -> Path | None:
    """Return the folder of a diffusers autoencoder: `folder`, its `vae`, or None if neither is.

    One without weights does not count where `folder` holds a tokenizer in a released form.

    Raises:
        CheckpointError: a `config.json` beside weights of diffusers is damaged.
    """
    found = list(_vaes(folder))
    whole = [candidate for candidate in found if holds_vae_weights(candidate)]
    if whole:
        return whole[0]
    if any(folder.glob("*coder.jit")) or any(folder.glob("*coder.safetensors")):
        return None
    return found[0] if found else None


def holds_vae_weights(folder: Path) -> bool:
    """Tell whether a folder has weights, or a part of them, under diffusers' name."""
    return any(folder.glob("diffusion_pytorch_model*"))


def _vaes(folder: Path) -> Iterator[Path]:
    """Yield `folder` and its `vae` where their `config.json` is of a diffusers autoencoder."""
    for candidate in (folder, folder / "vae"):
        path = candidate / CONFIG_FILE
        if not path.is_file():
            continue
        try:
            kind = read_json(path).get("_class_name")
        except CheckpointError:
            if holds_vae_weights(candidate):
                raise
            continue  # that of a released folder, which nothing reads
        if isinstance(kind, str) and kind.startswith("Autoencoder"):
            yield candidate


def _read_pair(path: Path, prefix: str, channels: int | None) -> dict[str, Tensor]:
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
        elif channels is not None:
            # a table says how many channels it has; flat, it must at least be divisible
            stated = tensor.dim() == 2 and len(tensor) not in (1, channels)
            if stated or not tensor.numel() or tensor.numel() % channels:
                raise CheckpointError(
                    f"{path} holds {list(tensor.shape)} numbers, which are no latent frames of "
                    f"{channels} channels, as the tokenizer beside it gives"
                )
            tensor = tensor.reshape(channels, -1)
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
