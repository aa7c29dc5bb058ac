"""Files of the Wan tokenizer: names of tensors, architecture, statistics of latents.

Source: nvidia-cosmos/cosmos-predict2.5 `_src/predict2/tokenizers/wan2pt1.py` (`tokenizer.pth`, the
same as `Wan2.1_VAE.pth`); huggingface/diffusers `models/autoencoders/autoencoder_kl_wan.py`, whose
tensors are the same ones under other names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from worldline.errors import CheckpointError
from worldline.files import read_json, unfinished
from worldline.tokenizers.opened import (
    CONFIG,
    DIFFUSERS_FILES,
    Layout,
    OpenedTokenizer,
    refuse_other_settings,
    renamed_by,
)
from worldline.tokenizers.wan.model import MEAN, WanTokenizer, WanTokenizerConfig
from worldline.weights.keymap import KeyMap
from worldline.weights.read import Checkpoint, open_checkpoint

# files that a folder may hold, in order of preference
FILES = ("tokenizer.pth", "Wan2.1_VAE.pth")

# our names to theirs, by rules applied in this order
_RULES: dict[Layout, tuple[tuple[str, str], ...]] = {
    "released": (
        (r"(block\d|layers\.\d+)\.conv1\.gamma", r"\1.residual.0.gamma"),
        (r"(block\d|layers\.\d+)\.conv1", r"\1.residual.2"),
        (r"(block\d|layers\.\d+)\.conv2\.gamma", r"\1.residual.3.gamma"),
        (r"(block\d|layers\.\d+)\.conv2", r"\1.residual.6"),
        (r"encoder\.layers", r"encoder.downsamples"),
        (r"decoder\.layers", r"decoder.upsamples"),
        (r"\.conv_in\.", r".conv1."),
        (r"\.conv_out\.gamma", r".head.0.gamma"),
        (r"\.conv_out\.", r".head.2."),
        (r"middle\.block1", r"middle.0"),
        (r"middle\.attention", r"middle.1"),
        (r"middle\.block2", r"middle.2"),
        (r"middle\.1\.gamma", r"middle.1.norm.gamma"),
        (r"\.qkv\.", r".to_qkv."),
        (r"\.out\.", r".proj."),
        (r"\.space\.", r".resample.1."),
        (r"\.time\.", r".time_conv."),
        (r"^quant_conv", r"conv1"),
        (r"^post_quant_conv", r"conv2"),
    ),
    "diffusers": (
        (r"\.conv(1|2|_out)\.gamma", r".norm\1.gamma"),
        (r"encoder\.layers", r"encoder.down_blocks"),
        (r"\.shortcut\.", r".conv_shortcut."),
        (r"middle\.block1", r"mid_block.resnets.0"),
        (r"middle\.block2", r"mid_block.resnets.1"),
        (r"middle\.attention\.gamma", r"mid_block.attentions.0.norm.gamma"),
        (r"middle\.attention", r"mid_block.attentions.0"),
        (r"\.qkv\.", r".to_qkv."),
        (r"\.out\.", r".proj."),
        (r"\.space\.", r".resample.1."),
        (r"\.time\.", r".time_conv."),
    ),
}


class OpenedWan(OpenedTokenizer[WanTokenizer, WanTokenizerConfig]):
    """A Wan tokenizer on disk; the reference computes in bfloat16."""

    def read(self, device: torch.device | str, dtype: torch.dtype) -> WanTokenizer:
        return super().read(device, dtype).channels_last()


def open_wan(path: Path) -> OpenedWan:
    """Open a tokenizer of either layout; headers only.

    Args:
        path: the file of weights; or a folder with one of `FILES`; or a folder of diffusers, a
            model's or its `vae`.

    Raises:
        CheckpointError: there is none, it is damaged or half downloaded, or a tensor does not fit.
    """
    file = _find(Path(path))
    source = open_checkpoint(file)
    layout = find_layout(source)
    stated = file.parent / CONFIG
    used = (stated,) if layout == "diffusers" and stated.is_file() else ()
    settings = read_json(stated) if used else {}
    config = read_config(source, settings)
    expected = diffusers_config(config)
    del expected["dropout"]
    if settings.get("decoder_base_dim") == config.channels:
        del expected["decoder_base_dim"]
    refuse_other_settings(stated, settings, expected)
    return OpenedWan(WanTokenizer, config, source, key_map(config, layout or "released"), used)


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"no tokenizer {path}")
    candidates = [path / name for name in FILES]
    candidates += [path / folder / name for folder in ("", "vae") for name in DIFFUSERS_FILES]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise CheckpointError(
        f"{path} holds no tokenizer of Wan2.1: neither {' nor '.join(FILES)} nor "
        f"{DIFFUSERS_FILES[0]}{unfinished(path)}"
    )


def key_map(config: WanTokenizerConfig, layout: Layout = "released") -> KeyMap:
    """Map of the names of a layout to ours."""
    with torch.device("meta"):
        ours = [name for name, _ in WanTokenizer(config).named_parameters()]
    return KeyMap({_theirs(name, layout, config.num_blocks): name for name in ours})


def _theirs(name: str, layout: Layout, num_blocks: int = 0) -> str:
    """Their name of one of our tensors; `num_blocks` matters to diffusers' decoder alone."""
    if layout == "diffusers" and (found := re.match(r"decoder\.layers\.(\d+)", name)):
        level, number = divmod(int(found[1]), num_blocks + 2)  # blocks, then an upsampler
        part = f"resnets.{number}" if number <= num_blocks else "upsamplers.0"
        name = f"decoder.up_blocks.{level}.{part}{name[found.end() :]}"
    return renamed_by(_RULES[layout], name)


def find_layout(source: Checkpoint) -> Layout | None:
    """Whose names the tensors have; None if they are of no Wan tokenizer."""
    for layout in _RULES:
        first = source.tensors.get(_theirs("encoder.conv_in.weight", layout))
        if first is not None and first.shape[2:] == (3, 3, 3):
            return layout
    return None


def read_config(source: Checkpoint, settings: Mapping[str, Any]) -> WanTokenizerConfig:
    """Configuration of a tokenizer, from its tensors' shapes.

    Args:
        source: with the names of either layout.
        settings: may hold "latents_mean" and "latents_std", as diffusers' config.json does; absent,
            they are the released ones, which are of 16 channels.

    Raises:
        CheckpointError: the tensors are not those of a Wan tokenizer.
    """
    layout = find_layout(source)

    def width(ours: str) -> int:
        info = source.tensors.get(_theirs(ours, layout)) if layout else None
        return info.shape[0] if info and info.shape else 0

    channels = width("encoder.conv_in.weight")
    latent_channels = width("encoder.conv_out.weight") // 2
    # width and depth of each level of the encoder, and whether the steps between halve time
    widths: list[int] = []
    depths: list[int] = []
    steps: list[bool] = []
    number = 0
    while True:
        layer = f"encoder.layers.{number}"
        number += 1
        if outputs := width(f"{layer}.conv1.weight"):
            if len(widths) == len(steps):
                widths.append(outputs)
                depths.append(0)
            depths[-1] += 1
        elif width(f"{layer}.space.weight"):
            steps.append(bool(width(f"{layer}.time.weight")))
        else:
            break
    whole = channels and not any(outputs % channels for outputs in widths)
    if not widths or not whole or len(set(depths)) > 1 or not latent_channels:
        raise CheckpointError(
            f"{source.path} holds no tokenizer of Wan2.1 (levels {widths} wide, {depths} deep)"
        )
    mean, std = (settings.get(f"latents_{name}") for name in ("mean", "std"))
    statistics: dict[str, Any] = {}
    if mean is not None and std is not None:
        statistics = {"mean": mean, "std": std}
    elif latent_channels != len(MEAN):
        raise CheckpointError(
            f"{source.path} has latents of {latent_channels} channels, whose mean and deviation "
            f"are not known; the released ones are of {len(MEAN)}"
        )
    try:
        return WanTokenizerConfig(
            channels=channels,
            multipliers=tuple(outputs // channels for outputs in widths),
            num_blocks=depths[0],
            temporal_steps=tuple(steps),
            latent_channels=latent_channels,
            **{name: tuple(numbers) for name, numbers in statistics.items()},
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source.path}: {error}") from error


def diffusers_config(config: WanTokenizerConfig) -> dict[str, Any]:
    """The `config.json` in diffusers' layout.

    The released file holds no statistics of latents: they are in the code that reads it.
    """
    return {
        "_class_name": "AutoencoderKLWan",
        "attn_scales": [],
        "base_dim": config.channels,
        "decoder_base_dim": None,
        "dim_mult": list(config.multipliers),
        "dropout": 0.0,
        "in_channels": 3,
        "is_residual": False,
        "latents_mean": list(config.mean),
        "latents_std": list(config.std),
        "num_res_blocks": config.num_blocks,
        "out_channels": 3,
        "patch_size": None,
        "scale_factor_spatial": config.spatial,
        "scale_factor_temporal": config.temporal,
        "temperal_downsample": list(config.temporal_steps),
        "z_dim": config.latent_channels,
    }
