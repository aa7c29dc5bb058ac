"""How the released tokenizer files name their tensors, and what can be read off the shapes.

Source: nvidia-cosmos/cosmos-predict1 `tokenizer/networks/`, `tokenizer/training/checkpointer.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from worldline.errors import CheckpointError
from worldline.nn.wavelet import EXACT_TAP
from worldline.tokenizers.cosmos.model import PRESETS, CosmosTokenizer, CosmosTokenizerConfig
from worldline.weights.keymap import KeyMap
from worldline.weights.read import Checkpoint, TensorInfo, renamed

_SUFFIXES = ("weight", "bias")
_RELEASED_LEVELS = PRESETS["DV8x16x16"].levels or ()

# the file's resampler convolutions are numbered in order of use
_DOWNSAMPLE = {"conv1": "space", "conv2": "time", "conv3": "mix"}
_UPSAMPLE = {"conv1": "time", "conv2": "space", "conv3": "mix"}


def leaves(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    """Yield the names of a layer's weight and bias there and here."""
    for suffix in _SUFFIXES:
        yield f"{theirs}.{suffix}", f"{ours}.{suffix}"


def _factorised(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    yield from leaves(f"{theirs}.0.conv3d", f"{ours}.space")
    yield from leaves(f"{theirs}.1.conv3d", f"{ours}.time")


def _block(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    for number in (1, 2):
        yield from leaves(f"{theirs}.norm{number}.norm", f"{ours}.norm{number}")
        yield from _factorised(f"{theirs}.conv{number}", f"{ours}.conv{number}")
    yield from leaves(f"{theirs}.nin_shortcut.conv3d", f"{ours}.shortcut")


def _half(
    half: str, level: str, resampler: str, convolutions: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    yield from _factorised(f"{half}.conv_in", f"{half}.conv_in")
    yield from _factorised(f"{half}.conv_out", f"{half}.conv_out")
    yield from leaves(f"{half}.norm_out.norm", f"{half}.norm_out")
    theirs, ours = f"{half}.{level}.{{i}}", f"{half}.levels.{{i}}"
    yield from _block(f"{theirs}.block.{{j}}", f"{ours}.blocks.{{j}}")
    for their_conv, our_conv in convolutions.items():
        yield from leaves(
            f"{theirs}.{resampler}.{their_conv}.conv3d", f"{ours}.resample.{our_conv}"
        )
    for number in (1, 2):
        yield from _block(f"{half}.mid.block_{number}", f"{half}.middle.block{number}")
    for index, axis in enumerate(("spatial", "temporal")):
        theirs, ours = f"{half}.mid.attn_1.{index}", f"{half}.middle.{axis}_attention"
        yield from leaves(f"{theirs}.norm.norm", f"{ours}.norm")
        for their_conv, our_conv in (("q", "q"), ("k", "k"), ("v", "v"), ("proj_out", "out")):
            yield from leaves(f"{theirs}.{their_conv}.conv3d", f"{ours}.{our_conv}")


_RENAME = {
    **dict(_half("encoder", "down", "downsample", _DOWNSAMPLE)),
    **dict(_half("decoder", "up", "upsample", _UPSAMPLE)),
    **dict(leaves("quant_conv.conv3d", "quant_conv")),
    **dict(leaves("post_quant_conv.conv3d", "post_quant_conv")),
}

_DROP = {
    "encoder.patcher3d.*": "wavelet buffers; the tap is read into the configuration",
    "decoder.unpatcher3d.*": "wavelet buffers; the tap is read into the configuration",
    "quantizer.*": "FSQ tables; the levels are read into the configuration",
    "inv_quant.quantizer.*": "FSQ tables of a decoder file",
}


def key_map(config: CosmosTokenizerConfig) -> KeyMap:
    """Return the map of bare names, which also skips convolutions that this network never runs.

    Files of the 0.1 release hold all three convolutions of every resampler.
    """
    unused = {}
    for level in range(len(config.level_channels)):
        for stem, step, names in (
            (f"encoder.down.{level}.downsample", config.down(level), _DOWNSAMPLE),
            (f"decoder.up.{level}.upsample", config.up(level), _UPSAMPLE),
        ):
            used = {"space": step.space, "time": step.time, "mix": any(step)}
            for theirs, ours in names.items():
                if not used[ours]:
                    unused[f"{stem}.{theirs}.*"] = "a convolution that the network never runs"
    return KeyMap(rename=_RENAME, drop={**_DROP, **unused})


def read_config(
    source: Checkpoint, *, name: str = "", levels: tuple[int, ...] | None = None
) -> CosmosTokenizerConfig:
    """Return the configuration of a tokenizer from its tensors' shapes and small buffers.

    Args:
        source: encoder, decoder, or both, with the bare names of an exported file.
        name: the folder's name; decides only what shapes cannot (files of the 0.1 release, and
            whether a file without quantiser buffers is discrete).
        levels: FSQ levels, for files that do not hold them.

    Raises:
        CheckpointError: the tensors are not those of a Cosmos video tokenizer.
    """
    tensors = source.tensors
    half, level, resampler = (
        ("encoder", "down", "downsample")
        if "encoder.conv_in.0.conv3d.weight" in tensors
        else ("decoder", "up", "upsample")
    )
    names = _DOWNSAMPLE if half == "encoder" else _UPSAMPLE
    outer = "encoder.conv_in.0" if half == "encoder" else "decoder.conv_out.0"
    widths = _widths(tensors, f"{half}.{level}.{{}}.block.0.conv1.0.conv3d.weight")
    blocks = _widths(tensors, f"{half}.{level}.0.block.{{}}.conv1.0.conv3d.weight")
    if f"{outer}.conv3d.weight" not in tensors or not widths:
        raise CheckpointError(
            f"{source.path}: not a Cosmos video tokenizer (no {outer}.conv3d.weight)"
        )
    outer_shape = tensors[f"{outer}.conv3d.weight"].shape
    patch = round((outer_shape[1 if half == "encoder" else 0] / 3) ** (1 / 3))
    steps = {
        ours: sum(
            f"{half}.{level}.{number}.{resampler}.{theirs}.conv3d.weight" in tensors
            for number in range(len(widths))
        )
        for theirs, ours in names.items()
    }
    spatial, temporal = patch * 2 ** steps["space"], patch * 2 ** steps["time"]
    found = re.search(r"[CD]V(\d+)x(\d+)x\d+", name)
    if found and steps["space"] == steps["time"] == len(widths) - 1:
        temporal, spatial = int(found[1]), int(found[2])  # 0.1: every resampler holds everything
    quant = tensors.get("quant_conv.conv3d.weight")
    post_quant = tensors.get("post_quant_conv.conv3d.weight")
    if quant is not None:
        latent_channels, z_channels = quant.shape[:2]
    elif post_quant is not None:
        z_channels, latent_channels = post_quant.shape[:2]
    else:
        raise CheckpointError(f"{source.path}: no quant_conv and no post_quant_conv in it")
    return CosmosTokenizerConfig(
        channels=outer_shape[0] if half == "encoder" else widths[0] // 2,
        level_channels=tuple(widths),
        num_blocks=len(blocks) - (half == "decoder"),
        patch=patch,
        spatial=spatial,
        temporal=temporal,
        z_channels=z_channels,
        latent_channels=latent_channels,
        levels=_levels(source, levels, latent_channels, name),
        tap=_tap(source),
    )


def _widths(tensors: Mapping[str, TensorInfo], pattern: str) -> list[int]:
    widths: list[int] = []
    while pattern.format(len(widths)) in tensors:
        widths.append(tensors[pattern.format(len(widths))].shape[0])
    return widths


def _levels(
    source: Checkpoint, given: tuple[int, ...] | None, channels: int, name: str
) -> tuple[int, ...] | None:
    for key in ("quantizer._levels", "inv_quant.quantizer._levels"):
        if key in source.tensors:
            return tuple(int(level) for level in source.read(key))
    if given is not None:
        return given
    if re.search(r"CV\d", name) or channels != len(_RELEASED_LEVELS):
        return None
    return _RELEASED_LEVELS


def _tap(source: Checkpoint) -> float:
    for key in ("encoder.patcher3d.wavelets", "decoder.unpatcher3d.wavelets"):
        if key in source.tensors:
            return float(source.read(key)[0])
    return EXACT_TAP


def network_view(source: Checkpoint, *, ema: bool = False) -> Checkpoint:
    """Return the tensors of the network in `source`, by the bare names of an exported file.

    An exported file is passed through. Of a training checkpoint the `network.` set is taken, or
    with `ema` the averaged one, whose names are written with dashes; what else it keeps (weights
    of the loss network, buffers of a compiled module) is left out.

    Raises:
        CheckpointError: `ema` is asked for, and the file holds no averaged weights.
    """
    if ema and not any(name.startswith("ema.network-") for name in source.tensors):
        raise CheckpointError(f"{source.path}: holds no averaged (EMA) weights")
    if not any(name.startswith("network.") for name in source.tensors):
        return source
    wanted = "ema.network-" if ema else "network."

    def bare(name: str) -> str | None:
        if not name.startswith(wanted):
            return None
        name = name.removeprefix(wanted).replace("-", ".")
        return name.removeprefix("_orig_mod.")

    return renamed(source, bare)


def released_tensors(model: CosmosTokenizer) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of the files "encoder" and "decoder", bf16, by their released names.

    The taps, and for a discrete tokenizer its levels, go into both files, as in released ones.
    """
    config = model.config
    keys = key_map(config)
    encoder: dict[str, Tensor] = {}
    decoder: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        half = encoder if name.startswith(("encoder.", "quant_conv.")) else decoder
        half[keys.released(name)] = parameter.detach().bfloat16().cpu().contiguous()
    taps = torch.full((2,), config.tap)
    encoder["encoder.patcher3d.wavelets"] = taps.bfloat16()
    decoder["decoder.unpatcher3d.wavelets"] = taps.bfloat16()
    if config.levels is not None:
        levels = torch.tensor(config.levels, dtype=torch.int32)
        encoder["quantizer._levels"] = levels
        decoder["inv_quant.quantizer._levels"] = levels.clone()
    return {"encoder": encoder, "decoder": decoder}
