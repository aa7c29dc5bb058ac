"""Files of the Cosmos tokenizers: names of tensors, architecture, statistics of latents.

Source: nvidia-cosmos/cosmos-predict1 `tokenizer/networks/`, `tokenizer/training/checkpointer.py`;
huggingface/diffusers `models/autoencoders/autoencoder_kl_cosmos.py`, whose tensors are the same
ones under other names, the levels of the decoder numbered from the coarsest.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldline.errors import CheckpointError
from worldline.files import read_json, unfinished
from worldline.nn.wavelet import EXACT_TAP
from worldline.tokenizers.cosmos.model import (
    PRESETS,
    CosmosTokenizer,
    CosmosTokenizerConfig,
    LatentStatistics,
)
from worldline.tokenizers.opened import (
    CONFIG,
    DIFFUSERS_FILES,
    Layout,
    OpenedTokenizer,
    refuse_other_settings,
    renamed_by,
    stored_tensors,
)
from worldline.weights.keymap import KeyMap
from worldline.weights.read import Checkpoint, joined, open_checkpoint, renamed

# files that a folder may hold, in order of preference
LAYOUTS = (
    ("encoder.safetensors", "decoder.safetensors"),
    ("encoder.jit", "decoder.jit"),
    ("autoencoder.safetensors",),
    ("autoencoder.jit",),
    ("model.safetensors",),
    ("model.pt",),
)
STATISTICS = ("mean_std.pt", "image_mean_std.pt", "mean_std.safetensors")

# our names to theirs, by rules applied in this order; first the convolutions of a resampler, which
# both number in their order of use
_NUMBERED = (
    (r"(encoder.*\.resample)\.space", r"\1.conv1"),
    (r"(encoder.*\.resample)\.time", r"\1.conv2"),
    (r"(decoder.*\.resample)\.time", r"\1.conv1"),
    (r"(decoder.*\.resample)\.space", r"\1.conv2"),
    (r"resample\.mix", r"resample.conv3"),
)
_RULES: dict[Layout, tuple[tuple[str, str], ...]] = {
    "released": (
        *_NUMBERED,
        (r"(resample\.conv\d)\.", r"\1.conv3d."),
        (r"encoder\.levels\.(\d+)\.resample", r"encoder.down.\1.downsample"),
        (r"decoder\.levels\.(\d+)\.resample", r"decoder.up.\1.upsample"),
        (r"encoder\.levels", r"encoder.down"),
        (r"decoder\.levels", r"decoder.up"),
        (r"\.blocks\.", r".block."),
        (r"middle\.block", r"mid.block_"),
        (r"middle\.spatial_attention", r"mid.attn_1.0"),
        (r"middle\.temporal_attention", r"mid.attn_1.1"),
        (r"\.space\.", r".0.conv3d."),
        (r"\.time\.", r".1.conv3d."),
        (r"\.shortcut\.", r".nin_shortcut.conv3d."),
        (r"\.([qkv])\.", r".\1.conv3d."),
        (r"\.out\.", r".proj_out.conv3d."),
        (r"(norm\w*)\.", r"\1.norm."),
        (r"quant_conv\.", r"quant_conv.conv3d."),
    ),
    "diffusers": (
        *_NUMBERED,
        (r"encoder\.levels\.(\d+)\.resample", r"encoder.down_blocks.\1.downsamplers.0"),
        (r"decoder\.levels\.(\d+)\.resample", r"decoder.up_blocks.\1.upsamplers.0"),
        (r"encoder\.levels", r"encoder.down_blocks"),
        (r"decoder\.levels", r"decoder.up_blocks"),
        (r"\.blocks\.", r".resnets."),
        (r"middle\.block1", r"mid_block.resnets.0"),
        (r"middle\.block2", r"mid_block.resnets.1"),
        (r"middle\.spatial_attention", r"mid_block.attentions.0"),
        (r"middle\.temporal_attention", r"mid_block.temp_attentions.0"),
        (r"\.space\.", r".conv_s."),
        (r"\.time\.", r".conv_t."),
        (r"\.shortcut\.", r".conv_shortcut."),
        (r"\.([qkv])\.", r".to_\1."),
        (r"\.out\.", r".to_out.0."),
        (r"(norm\w*)\.", r"\1.norm."),
    ),
}

_DROP = {
    "encoder.patcher3d.*": "wavelet buffers; the tap is read into the configuration",
    "decoder.unpatcher3d.*": "wavelet buffers; the tap is read into the configuration",
    "quantizer.*": "FSQ tables; the levels are read into the configuration",
    "inv_quant.quantizer.*": "FSQ tables of a decoder file",
}


class OpenedCosmos(OpenedTokenizer[CosmosTokenizer, CosmosTokenizerConfig]):
    """A Cosmos tokenizer on disk."""

    @cached_property
    def statistics(self) -> LatentStatistics | None:
        """Statistics of its latents; None if the folder holds none.

        Raises:
            CheckpointError: the file is damaged, or of latents with other channels.
        """
        return read_statistics(self.folder, self.config.latent_channels)


def open_tokenizer(*paths: Path) -> OpenedCosmos:
    """Open a tokenizer; headers only.

    Args:
        paths: a folder with one of `LAYOUTS`, a folder of diffusers (a model's, or its `vae`), the
            path of a whole file, or those of encoder and decoder.

    Raises:
        CheckpointError: no tokenizer, half of one, or a tensor that does not fit.
    """
    files = tokenizer_files(paths[0]) if len(paths) == 1 and not paths[0].is_file() else paths
    folder = files[0].parent
    whole = files[0] if len(files) == 1 else folder
    source = network_view(joined([open_checkpoint(file) for file in files], whole))
    config = read_config(source, folder.name)
    layout = find_layout(source)
    settings = [folder / name for name in STATISTICS]
    if layout == "diffusers":
        settings = [folder / CONFIG]
        stated = diffusers_config(config)
        del stated["latents_mean"], stated["latents_std"]  # of statistics, which come later
        refuse_other_settings(folder / CONFIG, read_json(folder / CONFIG), stated)
    existing = tuple(path for path in settings if path.exists())
    return OpenedCosmos(CosmosTokenizer, config, source, key_map(config, layout), existing)


def tokenizer_files(folder: Path) -> list[Path]:
    """Files of the tokenizer in a folder.

    Raises:
        CheckpointError: there is none, or half of a pair is missing.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no tokenizer {folder}")
    newest = sorted(folder.glob("iter_*.pt"), reverse=True)
    layouts = [
        *((path / name,) for path in (folder, folder / "vae") for name in DIFFUSERS_FILES),
        *(tuple(folder / name for name in names) for names in LAYOUTS),
        *((path,) for path in newest),
    ]
    missing = ""
    for files in layouts:
        absent = [file for file in files if not file.exists()]
        if not absent:
            return list(files)
        if len(absent) < len(files):
            missing = f"{folder} is half downloaded: {absent[0].name} is missing"
    raise CheckpointError(
        missing
        or f"{folder} holds no tokenizer: neither encoder.jit with decoder.jit, nor "
        f"autoencoder.jit, nor model.pt, nor {DIFFUSERS_FILES[0]}{unfinished(folder)}"
    )


def find_layout(source: Checkpoint) -> Layout:
    """Whose names the tensors have."""
    return "diffusers" if "encoder.conv_in.conv_s.weight" in source.tensors else "released"


def key_map(config: CosmosTokenizerConfig, layout: Layout = "released") -> KeyMap:
    """Map of the bare names of an exported file, or of those in diffusers, to ours."""
    with torch.device("meta"):
        ours = [name for name, _ in CosmosTokenizer(config).named_parameters()]
    num_levels = len(config.level_channels)
    rename = {_theirs(name, layout, num_levels): name for name in ours}
    if layout == "diffusers":
        return KeyMap(rename)
    drop = dict(_DROP)
    for number in range(num_levels):
        for stem in (f"encoder.down.{number}.downsample", f"decoder.up.{number}.upsample"):
            for conv in ("conv1", "conv2", "conv3"):
                if f"{stem}.{conv}.conv3d.weight" not in rename:
                    # files of the 0.1 release hold all three of every resampler
                    drop[f"{stem}.{conv}.*"] = "a convolution that the network never runs"
    return KeyMap(rename, drop)


def _theirs(name: str, layout: Layout, num_levels: int = 0) -> str:
    """Their name of one of our tensors; `num_levels` matters to diffusers' decoder alone."""
    if layout == "diffusers" and (found := re.match(r"decoder\.levels\.(\d+)", name)):
        name = f"decoder.levels.{num_levels - 1 - int(found[1])}{name[found.end() :]}"
    return renamed_by(_RULES[layout], name)


def read_config(
    source: Checkpoint, name: str = "", *, levels: tuple[int, ...] | None = None
) -> CosmosTokenizerConfig:
    """Configuration of a tokenizer, from its tensors' shapes and small buffers.

    Args:
        source: encoder, decoder, or both.
        name: the folder's name; decides only what shapes cannot (files of the 0.1 release, and
            whether a file without quantiser buffers is discrete).
        levels: FSQ levels, for files that do not hold them.

    Raises:
        CheckpointError: the tensors are not those of a Cosmos video tokenizer.
    """
    layout = find_layout(source)

    def shape(ours: str) -> tuple[int, ...]:
        info = source.tensors.get(_theirs(ours, layout))
        return info.shape if info else ()

    def width(ours: str) -> int:
        return (*shape(ours), 0)[0]

    half, outer = "encoder", shape("encoder.conv_in.space.weight")
    if not outer:
        half, outer = "decoder", shape("decoder.conv_out.space.weight")
    level_channels: list[int] = []
    while outputs := width(f"{half}.levels.{len(level_channels)}.blocks.0.conv1.space.weight"):
        level_channels.append(outputs)
    num_blocks = 0
    while width(f"{half}.levels.0.blocks.{num_blocks}.conv1.space.weight"):
        num_blocks += 1
    latent_and_z = shape("quant_conv.weight")[:2] or shape("post_quant_conv.weight")[1::-1]
    if len(outer) != 5 or not level_channels or len(latent_and_z) != 2:
        raise CheckpointError(f"{source.path}: not a Cosmos video tokenizer")
    latent_channels, z_channels = latent_and_z
    patch = round((outer[1 if half == "encoder" else 0] / 3) ** (1 / 3))
    steps = {
        axis: sum(
            bool(shape(f"{half}.levels.{number}.resample.{axis}.weight"))
            for number in range(len(level_channels))
        )
        for axis in ("space", "time")
    }
    spatial, temporal = patch * 2 ** steps["space"], patch * 2 ** steps["time"]
    found = re.search(r"[CD]V(\d+)x(\d+)x\d+", name)
    if found and steps["space"] == steps["time"] == len(level_channels) - 1:
        temporal, spatial = int(found[1]), int(found[2])  # 0.1: every resampler holds everything
    try:
        return CosmosTokenizerConfig(
            channels=outer[0] if half == "encoder" else level_channels[0] // 2,
            level_channels=tuple(level_channels),
            num_blocks=num_blocks - (half == "decoder"),
            patch=patch,
            spatial=spatial,
            temporal=temporal,
            z_channels=z_channels,
            latent_channels=latent_channels,
            levels=_levels(source, levels, latent_channels, name),
            tap=_tap(source),
        )
    except ValueError as error:
        raise CheckpointError(f"{source.path}: {error}") from error


def _levels(
    source: Checkpoint, stated: tuple[int, ...] | None, channels: int, name: str
) -> tuple[int, ...] | None:
    for key in ("quantizer._levels", "inv_quant.quantizer._levels"):
        if key in source.tensors:
            return tuple(int(level) for level in source.read(key))
    released = PRESETS["DV8x16x16"].levels
    assert released is not None
    continuous = re.search(r"CV\d", name) or channels != len(released)
    continuous = continuous or find_layout(source) == "diffusers"  # which has no discrete one
    return stated or (None if continuous else released)


def _tap(source: Checkpoint) -> float:
    for key in ("encoder.patcher3d.wavelets", "decoder.unpatcher3d.wavelets"):
        if key in source.tensors:
            return float(source.read(key)[0])
    return EXACT_TAP


def network_view(source: Checkpoint, *, ema: bool = False) -> Checkpoint:
    """Tensors of the network in a file, by the bare names of an exported one.

    An exported file is passed through. From a training checkpoint the `network.` set is taken, or
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


def read_statistics(folder: Path, channels: int) -> LatentStatistics | None:
    """Statistics of latents in the folder of a tokenizer's weights; None if it holds none.

    Args:
        folder: with `mean_std.pt` and perhaps `image_mean_std.pt`, with `mean_std.safetensors`, or
            one of diffusers, whose `config.json` holds them.
        channels: latent channels of the tokenizer.

    Raises:
        CheckpointError: a file is damaged, its content is not a mean and a deviation, or they are
            of latents with other channels.
    """
    released, images, ours = (folder / name for name in STATISTICS)
    tensors: dict[str, Tensor] = {}
    try:
        if released.exists():
            path = released
            tensors["mean"], tensors["std"] = _read_pair(released, channels)
            if images.exists():
                path = images
                pair = _read_pair(images, channels)
                tensors["image_mean"], tensors["image_std"] = (one.flatten() for one in pair)
        elif ours.exists():
            path, source = ours, open_checkpoint(ours)
            tensors = {name: source.read(name) for name in source.tensors}
        elif any((folder / name).exists() for name in DIFFUSERS_FILES):
            path, settings = folder / CONFIG, read_json(folder / CONFIG)
            for name in ("mean", "std"):
                if settings.get(f"latents_{name}") is not None:
                    numbers = torch.tensor(settings[f"latents_{name}"], dtype=torch.float32)
                    tensors[name] = numbers.view(channels, -1)
        if not tensors:
            return None
        # float32 and copies: a mapped file may go away
        statistics = LatentStatistics(**{name: t.float().clone() for name, t in tensors.items()})
    except CheckpointError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: no statistics of latents: {error}") from error
    if len(statistics.mean) != channels:
        raise CheckpointError(
            f"{path} has statistics of {len(statistics.mean)} channels, its tokenizer has "
            f"latents of {channels}"
        )
    return statistics


def _read_pair(path: Path, channels: int) -> list[Tensor]:
    """A saved mean and deviation, (channels, t) each; most are flat, channel slowest."""
    source = open_checkpoint(path)
    if source.tensors.keys() != {"0", "1"}:
        names = ", ".join(sorted(source.tensors)[:4])
        raise CheckpointError(f"{path} holds {names} instead of a mean and a deviation")
    pair = [source.read(name) for name in ("0", "1")]
    for tensor in pair:
        rows = len(tensor) if tensor.dim() == 2 else 1
        if rows not in (1, channels) or not tensor.numel() or tensor.numel() % channels:
            raise CheckpointError(
                f"{path} has statistics {list(tensor.shape)}, its tokenizer has latents of "
                f"{channels} channels"
            )
    return [tensor.reshape(channels, -1) for tensor in pair]


def released_tensors(model: CosmosTokenizer) -> dict[str, dict[str, Tensor]]:
    """Tensors of the files "encoder" and "decoder", bf16, by their released names.

    The taps, and for a discrete tokenizer its levels, go into both files, as in released ones.
    """
    config = model.config
    encoder: dict[str, Tensor] = {}
    decoder: dict[str, Tensor] = {}
    for name, tensor in stored_tensors(model, key_map(config)).items():
        half = encoder if name.startswith(("encoder.", "quant_conv.")) else decoder
        half[name] = tensor.bfloat16().cpu()
    taps = torch.full((2,), config.tap)
    encoder["encoder.patcher3d.wavelets"] = taps.bfloat16()
    decoder["decoder.unpatcher3d.wavelets"] = taps.bfloat16()
    if config.levels is not None:
        levels = torch.tensor(config.levels, dtype=torch.int32)
        encoder["quantizer._levels"] = levels
        decoder["inv_quant.quantizer._levels"] = levels.clone()
    return {"encoder": encoder, "decoder": decoder}


def diffusers_config(
    config: CosmosTokenizerConfig, statistics: LatentStatistics | None = None
) -> dict[str, Any]:
    """The `config.json` of a continuous tokenizer in diffusers' layout.

    diffusers computes with exact wavelet taps: `config.tap` is not carried over.
    """
    return {
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
        "latents_mean": None if statistics is None else statistics.mean.flatten().tolist(),
        "latents_std": None if statistics is None else statistics.std.flatten().tolist(),
    }
