"""The layout in which diffusers keeps the continuous tokenizer: `AutoencoderKLCosmos`.

Source: huggingface/diffusers `models/autoencoders/autoencoder_kl_cosmos.py`,
`scripts/convert_cosmos_to_diffusers.py`. Its tensors are the released ones under other names, the
levels of the decoder numbered from the coarsest; it stores no wavelet taps.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from worldline.errors import CheckpointError
from worldline.files import read_json
from worldline.tokenizers.cosmos.model import CosmosTokenizer, CosmosTokenizerConfig
from worldline.tokenizers.cosmos.statistics import (
    CONFIG_FILE,
    LatentStatistics,
    find_vae,
)
from worldline.tokenizers.cosmos.weights import key_map, leaves, read_config
from worldline.weights.keymap import KeyMap
from worldline.weights.read import Checkpoint, open_checkpoint, renamed

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")


def _factorised(theirs: str, released: str) -> Iterator[tuple[str, str]]:
    yield from leaves(f"{theirs}.conv_s", f"{released}.0.conv3d")
    yield from leaves(f"{theirs}.conv_t", f"{released}.1.conv3d")


def _block(theirs: str, released: str) -> Iterator[tuple[str, str]]:
    for number in (1, 2):
        yield from leaves(f"{theirs}.norm{number}.norm", f"{released}.norm{number}.norm")
        yield from _factorised(f"{theirs}.conv{number}", f"{released}.conv{number}")
    yield from leaves(f"{theirs}.conv_shortcut", f"{released}.nin_shortcut.conv3d")


def _attention(theirs: str, released: str) -> Iterator[tuple[str, str]]:
    yield from leaves(f"{theirs}.norm.norm", f"{released}.norm.norm")
    for their_conv, conv in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        yield from leaves(f"{theirs}.{their_conv}", f"{released}.{conv}.conv3d")


def _half(half: str, num_levels: int) -> Iterator[tuple[str, str]]:
    kind = "down" if half == "encoder" else "up"
    yield from _factorised(f"{half}.conv_in", f"{half}.conv_in")
    yield from _factorised(f"{half}.conv_out", f"{half}.conv_out")
    yield from leaves(f"{half}.norm_out.norm", f"{half}.norm_out.norm")
    for number in range(num_levels):
        released = number if half == "encoder" else num_levels - 1 - number
        theirs, ours = f"{half}.{kind}_blocks.{number}", f"{half}.{kind}.{released}"
        yield from _block(f"{theirs}.resnets.{{j}}", f"{ours}.block.{{j}}")
        for conv in ("conv1", "conv2", "conv3"):
            yield from leaves(
                f"{theirs}.{kind}samplers.0.{conv}", f"{ours}.{kind}sample.{conv}.conv3d"
            )
    for number in (0, 1):
        yield from _block(f"{half}.mid_block.resnets.{number}", f"{half}.mid.block_{number + 1}")
    yield from _attention(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1.0")
    yield from _attention(f"{half}.mid_block.temp_attentions.0", f"{half}.mid.attn_1.1")


def name_map(num_levels: int) -> KeyMap:
    """Return the map from diffusers' names (on the left) to the released ones."""
    pairs = [
        *_half("encoder", num_levels),
        *_half("decoder", num_levels),
        *leaves("quant_conv", "quant_conv.conv3d"),
        *leaves("post_quant_conv", "post_quant_conv.conv3d"),
    ]
    return KeyMap(rename=dict(pairs))


def open_vae(folder: Path) -> tuple[Checkpoint, CosmosTokenizerConfig]:
    """Return the tensors of a diffusers folder by their released names, and their configuration.

    Args:
        folder: one for which `find_vae` is not None: the folder of the tokenizer, or a model's.

    Raises:
        CheckpointError: it holds another kind of model, its weights are missing, or its
            `config.json` and its tensors are not of one model.
    """
    folder = find_vae(folder) or folder
    settings = read_json(folder / CONFIG_FILE)
    kind = settings.get("_class_name")
    if kind != "AutoencoderKLCosmos":
        raise CheckpointError(f"{folder} holds a {kind}; AutoencoderKLCosmos is expected")
    path = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if path is None:
        raise CheckpointError(f"{folder} is half downloaded: {WEIGHTS[0]} is missing")
    source = open_checkpoint(path)
    num_levels = 0
    while f"encoder.down_blocks.{num_levels}.resnets.0.conv1.conv_s.weight" in source.tensors:
        num_levels += 1
    if not num_levels:
        raise CheckpointError(f"{path}: not a Cosmos video tokenizer in the layout of diffusers")
    keys = name_map(num_levels)
    try:
        view = renamed(source, keys.ours)
    except CheckpointError as error:
        raise CheckpointError(f"{path} does not fit the model: {error}") from error
    config = read_config(view, name="CV")  # diffusers has no discrete one
    stated = diffusers_config(config)
    for name, value in settings.items():
        if name in stated and stated[name] is not None and stated[name] != value:
            raise CheckpointError(
                f"{folder / CONFIG_FILE}: {name} is {value}, yet the tensors beside it are of a "
                f"tokenizer with {stated[name]}"
            )
    return view, config


def diffusers_tensors(model: CosmosTokenizer) -> dict[str, Tensor]:
    """Return the tensors of a continuous tokenizer by diffusers' names, in their own dtype.

    diffusers computes with exact wavelet taps: what `model.config.tap` says is not carried over.

    Raises:
        ValueError: the tokenizer is discrete, or its quantiser changes the number of channels.
    """
    config = model.config
    if config.levels is not None or config.z_channels != config.latent_channels:
        raise ValueError("diffusers keeps continuous tokenizers alone")
    released, keys = key_map(config), name_map(len(config.level_channels))
    return {
        keys.released(released.released(name)): parameter.detach()
        for name, parameter in model.named_parameters()
    }


def diffusers_config(
    config: CosmosTokenizerConfig, statistics: LatentStatistics | None = None
) -> dict[str, Any]:
    """Return the `config.json` that belongs to `diffusers_tensors`."""
    settings: dict[str, Any] = {
        "_class_name": "AutoencoderKLCosmos",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": config.latent_channels,
        "encoder_block_out_channels": [config.channels, *config.level_channels],
        "decode_block_out_channels": [*config.level_channels, config.level_channels[-1]],
        "num_layers": config.num_blocks,
        "patch_size": config.patch,
        "patch_type": "haar",
        "spatial_compression_ratio": config.spatial,
        "temporal_compression_ratio": config.temporal,
        "latents_mean": None,
        "latents_std": None,
    }
    if statistics is not None:
        settings["latents_mean"] = statistics.mean.flatten().tolist()
        settings["latents_std"] = statistics.std.flatten().tolist()
    return settings
