"""Files of the Wan tokenizer: names of tensors, architecture, statistics of latents.

Source: nvidia-cosmos/cosmos-predict2.5 `_src/predict2/tokenizers/wan2pt1.py` (`tokenizer.pth`, the
same as `Wan2.1_VAE.pth`); huggingface/diffusers `models/autoencoders/autoencoder_kl_wan.py`, whose
tensors are the same ones under other names.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from worldline.errors import CheckpointError
from worldline.tokenizers.wan.model import MEAN, STD, WanTokenizer, WanTokenizerConfig
from worldline.weights.checkpoint import Checkpoint, open_set, take_network
from worldline.weights.keymap import KeyMap, renamed_by
from worldline.weights.networks import (
    VAE_LAYOUTS,
    Network,
    find_files,
    last_resorts,
    require_settings,
    shapes_of,
)

# files that a folder may hold, in order of preference
FILES = ("tokenizer.pth", "Wan2.1_VAE.pth")

# our names to theirs, by rules applied in this order
_COMMON = {
    r"\.qkv\.": r".to_qkv.",
    r"\.out\.": r".proj.",
    r"\.space\.": r".resample.1.",
    r"\.time\.": r".time_conv.",
}
_RELEASED = {
    r"(block\d|layers\.\d+)\.conv1\.gamma": r"\1.residual.0.gamma",
    r"(block\d|layers\.\d+)\.conv1": r"\1.residual.2",
    r"(block\d|layers\.\d+)\.conv2\.gamma": r"\1.residual.3.gamma",
    r"(block\d|layers\.\d+)\.conv2": r"\1.residual.6",
    r"encoder\.layers": r"encoder.downsamples",
    r"decoder\.layers": r"decoder.upsamples",
    r"\.conv_in\.": r".conv1.",
    r"\.conv_out\.gamma": r".head.0.gamma",
    r"\.conv_out\.": r".head.2.",
    r"middle\.block1": r"middle.0",
    r"middle\.attention": r"middle.1",
    r"middle\.block2": r"middle.2",
    r"middle\.1\.gamma": r"middle.1.norm.gamma",
    **_COMMON,
    r"^quant_conv": r"conv1",
    r"^post_quant_conv": r"conv2",
}
_DIFFUSERS = {
    r"\.conv(1|2|_out)\.gamma": r".norm\1.gamma",
    r"encoder\.layers": r"encoder.down_blocks",
    r"\.shortcut\.": r".conv_shortcut.",
    r"middle\.block1": r"mid_block.resnets.0",
    r"middle\.block2": r"mid_block.resnets.1",
    r"middle\.attention\.gamma": r"mid_block.attentions.0.norm.gamma",
    r"middle\.attention": r"mid_block.attentions.0",
    **_COMMON,
}
FIRST = "encoder.conv_in.weight"
ANCHORS = renamed_by(_RELEASED, FIRST), renamed_by(_DIFFUSERS, FIRST)


@dataclass(frozen=True)
class WanNetwork(Network[WanTokenizerConfig]):
    """A Wan tokenizer on disk; the reference computes in bfloat16."""

    def read(self, device: torch.device | str, dtype: torch.dtype) -> WanTokenizer:
        model: WanTokenizer = super().read(device, dtype)
        return model.channels_last()


def open_wan(path: Path) -> WanNetwork:
    """Open a tokenizer of either layout; headers only.

    Args:
        path: the file of weights; or a folder with one of `FILES`; or a folder of diffusers, a
            model's or its `vae`.

    Raises:
        CheckpointError: there is none, it is damaged or half downloaded, or a tensor does not fit.
    """
    file = path
    if not path.is_file():
        names = chain(FILES, VAE_LAYOUTS, last_resorts(path))
        [file] = find_files(path, names, "tokenizer of Wan2.1", ANCHORS)
    source = network_view(open_set(file))
    stated, settings, theirs = file.parent / "config.json", {}, is_diffusers(source)
    if theirs and stated.is_file():
        plain = {"_class_name": "AutoencoderKLWan", "is_residual": False, "patch_size": None}
        settings = require_settings(stated, plain)
    config = read_config(source, settings)
    beside = (stated,) if theirs else ()
    return WanNetwork(WanTokenizer, config, source, key_map(config, theirs), beside).check()


def key_map(config: WanTokenizerConfig, diffusers: bool = False) -> KeyMap:
    """Map of the names of a layout to ours."""
    ours = shapes_of(WanTokenizer, config)
    return KeyMap({_theirs(name, diffusers, config.num_blocks): name for name in ours})


def _theirs(name: str, diffusers: bool, num_blocks: int = 0) -> str:
    """Their name of one of our tensors; `num_blocks` matters to diffusers' decoder alone."""
    if diffusers and (match := re.match(r"decoder\.layers\.(\d+)", name)):
        level, number = divmod(int(match[1]), num_blocks + 2)  # blocks, then an upsampler
        part = f"resnets.{number}" if number <= num_blocks else "upsamplers.0"
        name = f"decoder.up_blocks.{level}.{part}{name[match.end() :]}"
    return renamed_by(_DIFFUSERS if diffusers else _RELEASED, name)


def network_view(source: Checkpoint) -> Checkpoint:
    """Tensors of the network among those of a file."""
    return take_network(source, ANCHORS)


def is_diffusers(source: Checkpoint) -> bool:
    """Whether the tensors have diffusers' names."""
    return FIRST in source.tensors


def is_wan(source: Checkpoint) -> bool:
    """Whether the tensors are of a Wan tokenizer."""
    first = source.tensors.get(_theirs(FIRST, is_diffusers(source)))
    return first is not None and first.shape[2:] == (3, 3, 3)


def read_config(source: Checkpoint, settings: Mapping[str, Any]) -> WanTokenizerConfig:
    """Configuration of a tokenizer of either layout, from its tensors' shapes.

    The settings may hold "latents_mean" and "latents_std", as diffusers' config.json does; absent,
    they are the released ones, which are of 16 channels.
    """
    diffusers = is_diffusers(source)

    def width(ours: str) -> int:
        meta = source.tensors.get(_theirs(ours, diffusers))
        return 0 if meta is None else math.prod(meta.shape[:1])

    levels: list[list[int]] = [[]]  # widths of the blocks of each level of the encoder
    steps: list[bool] = []  # whether those between them halve time
    for number in count():
        layer = f"encoder.layers.{number}"
        if outputs := width(f"{layer}.conv1.weight"):
            levels[-1].append(outputs)
        elif width(f"{layer}.space.weight"):
            steps.append(bool(width(f"{layer}.time.weight")))
            levels.append([])
        else:
            break
    try:
        channels = width("encoder.conv_in.weight")
        return WanTokenizerConfig(
            channels=channels,
            multipliers=tuple(level[0] // channels for level in levels),
            num_blocks=len(levels[0]),
            temporal_steps=tuple(steps),
            latent_channels=width("encoder.conv_out.weight") // 2,
            mean=tuple(settings.get("latents_mean") or MEAN),
            std=tuple(settings.get("latents_std") or STD),
        )
    except (ArithmeticError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source.path} holds no tokenizer of Wan2.1: {error}") from error
