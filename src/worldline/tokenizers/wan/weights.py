"""How the released files name the tensors of the Wan tokenizer, and what their shapes tell.

Source: nvidia-cosmos/cosmos-predict2.5 `_src/predict2/tokenizers/wan2pt1.py` (`tokenizer.pth`, the
same as `Wan2.1_VAE.pth`); huggingface/diffusers `models/autoencoders/autoencoder_kl_wan.py`, whose
tensors are the same ones under other names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import Tensor

from worldline.errors import CheckpointError
from worldline.tokenizers.wan.model import MEAN, WanTokenizer, WanTokenizerConfig
from worldline.weights.keymap import KeyMap
from worldline.weights.read import Checkpoint

Layout = Literal["released", "diffusers"]
Pairs = Iterator[tuple[str, str]]

# (norm, convolution) twice, and the shortcut
_BLOCK = {
    "released": ("residual.0", "residual.2", "residual.3", "residual.6", "shortcut"),
    "diffusers": ("norm1", "conv1", "norm2", "conv2", "conv_shortcut"),
}
_MIDDLE = {
    "released": ("middle.0", "middle.1", "middle.2"),
    "diffusers": ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
}
# first convolution, last norm, last convolution
_ENDS = {
    "released": ("conv1", "head.0", "head.2"),
    "diffusers": ("conv_in", "norm_out", "conv_out"),
}
# before and after latents
_LATENTS = {
    "released": ("conv1", "conv2"),
    "diffusers": ("quant_conv", "post_quant_conv"),
}


def _leaves(theirs: str, ours: str) -> Pairs:
    for suffix in ("weight", "bias"):
        yield f"{theirs}.{suffix}", f"{ours}.{suffix}"


def _convolution(norm: str, theirs: str, ours: str) -> Pairs:
    yield f"{norm}.gamma", f"{ours}.gamma"
    yield from _leaves(theirs, ours)


def _block(layout: Layout, theirs: str, ours: str) -> Pairs:
    norm1, conv1, norm2, conv2, shortcut = (f"{theirs}.{name}" for name in _BLOCK[layout])
    yield from _convolution(norm1, conv1, f"{ours}.conv1")
    yield from _convolution(norm2, conv2, f"{ours}.conv2")
    yield from _leaves(shortcut, f"{ours}.shortcut")


def _resampler(theirs: str, ours: str) -> Pairs:
    yield from _leaves(f"{theirs}.resample.1", f"{ours}.space")
    yield from _leaves(f"{theirs}.time_conv", f"{ours}.time")


def _frame(layout: Layout, half: str) -> Pairs:
    """Yield names of what both halves have alike."""
    first, norm, last = (f"{half}.{name}" for name in _ENDS[layout])
    yield from _leaves(first, f"{half}.conv_in")
    yield from _convolution(norm, last, f"{half}.conv_out")
    block1, attention, block2 = (f"{half}.{name}" for name in _MIDDLE[layout])
    yield from _block(layout, block1, f"{half}.middle.block1")
    yield from _block(layout, block2, f"{half}.middle.block2")
    yield f"{attention}.norm.gamma", f"{half}.middle.attention.gamma"
    yield from _leaves(f"{attention}.to_qkv", f"{half}.middle.attention.qkv")
    yield from _leaves(f"{attention}.proj", f"{half}.middle.attention.out")


def _encoder(layout: Layout) -> Pairs:
    yield from _frame(layout, "encoder")
    theirs = "encoder.downsamples.{i}" if layout == "released" else "encoder.down_blocks.{i}"
    yield from _block(layout, theirs, "encoder.layers.{i}")
    yield from _resampler(theirs, "encoder.layers.{i}")


def _decoder(layout: Layout, config: WanTokenizerConfig) -> Pairs:
    yield from _frame(layout, "decoder")
    if layout == "released":
        yield from _block(layout, "decoder.upsamples.{i}", "decoder.layers.{i}")
        yield from _resampler("decoder.upsamples.{i}", "decoder.layers.{i}")
        return
    number = 0
    for level in range(len(config.multipliers)):
        theirs = f"decoder.up_blocks.{level}"
        for block in range(config.num_blocks + 1):
            yield from _block(layout, f"{theirs}.resnets.{block}", f"decoder.layers.{number}")
            number += 1
        if level < len(config.temporal_steps):
            yield from _resampler(f"{theirs}.upsamplers.0", f"decoder.layers.{number}")
            number += 1


def key_map(config: WanTokenizerConfig, layout: Layout = "released") -> KeyMap:
    """Return the map from the names of a layout to ours."""
    before, after = _LATENTS[layout]
    pairs = [
        *_encoder(layout),
        *_decoder(layout, config),
        *_leaves(before, "quant_conv"),
        *_leaves(after, "post_quant_conv"),
    ]
    return KeyMap(rename=dict(pairs))


def find_layout(source: Checkpoint) -> Layout | None:
    """Return whose names the tensors have; None if they are of no Wan tokenizer."""
    for layout in ("released", "diffusers"):
        first = f"encoder.{_ENDS[layout][0]}.weight"
        if first in source.tensors and source.tensors[first].shape[2:] == (3, 3, 3):
            return layout
    return None


def read_config(source: Checkpoint, settings: Mapping[str, Any]) -> WanTokenizerConfig:
    """Return the configuration of a tokenizer from its tensors' shapes.

    Args:
        source: with the names of either layout.
        settings: may hold "latents_mean" and "latents_std", as diffusers' config.json does; absent,
            they are the released ones, which are of 16 channels.

    Raises:
        CheckpointError: the tensors are not those of a Wan tokenizer.
    """
    layout = find_layout(source)
    if layout is None:
        raise CheckpointError(f"{source.path} holds no tokenizer of Wan2.1")
    theirs = {ours: name for name, ours in _named(source, layout)}
    shapes = {ours: source.tensors[name].shape for ours, name in theirs.items()}
    channels = shapes["encoder.conv_in.weight"][0]
    widths, depths, steps = _levels(shapes)
    latent_channels = shapes.get("encoder.conv_out.weight", (0,))[0] // 2
    whole = all(width % channels == 0 for width in widths)
    if not widths or not whole or len(set(depths)) > 1 or not latent_channels:
        raise CheckpointError(
            f"{source.path} holds no tokenizer of Wan2.1 (levels {widths} wide and {depths} deep)"
        )
    mean, std = (settings.get(f"latents_{name}") for name in ("mean", "std"))
    given: dict[str, Any] = {}
    if mean is not None and std is not None:
        given = {"mean": mean, "std": std}
    elif latent_channels != len(MEAN):
        raise CheckpointError(
            f"{source.path} gives latents of {latent_channels} channels, whose mean and deviation "
            f"are not known: the released ones are of {len(MEAN)}"
        )
    try:
        given = {name: tuple(numbers) for name, numbers in given.items()}
        return WanTokenizerConfig(
            channels=channels,
            multipliers=tuple(width // channels for width in widths),
            num_blocks=depths[0],
            temporal_steps=tuple(steps),
            latent_channels=latent_channels,
            **given,
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source.path}: {error}") from error


def _named(source: Checkpoint, layout: Layout) -> Iterator[tuple[str, str]]:
    """Yield the encoder's tensors under both names; strangers are told later, all at once."""
    keys = KeyMap(rename=dict(_encoder(layout)))
    for name in source.tensors:
        if found := keys.find(name):
            yield name, found[1]


def _levels(shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[int], list[int], list[bool]]:
    """Return width and depth of each level of the encoder, and the steps between them."""
    widths: list[int] = []
    depths: list[int] = []
    steps: list[bool] = []
    number = 0
    while True:
        layer = f"encoder.layers.{number}"
        if block := shapes.get(f"{layer}.conv1.weight"):
            if len(widths) == len(steps):
                widths.append(block[0])
                depths.append(0)
            depths[-1] += 1
        elif f"{layer}.space.weight" in shapes:
            steps.append(f"{layer}.time.weight" in shapes)
        else:
            return widths, depths, steps
        number += 1


def released_tensors(model: WanTokenizer) -> dict[str, Tensor]:
    """Return the tensors of `tokenizer.pth`, by their released names, in their own dtype.

    The statistics of latents are not among them: they are in the code that reads such a file.
    """
    return _tensors(model, "released")


def diffusers_tensors(model: WanTokenizer) -> dict[str, Tensor]:
    """Return the tensors by diffusers' names, in their own dtype."""
    return _tensors(model, "diffusers")


def _tensors(model: WanTokenizer, layout: Layout) -> dict[str, Tensor]:
    keys = key_map(model.config, layout)
    return {
        keys.released(name): parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
    }


def diffusers_config(config: WanTokenizerConfig) -> dict[str, Any]:
    """Return the `config.json` that belongs to `diffusers_tensors`."""
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
