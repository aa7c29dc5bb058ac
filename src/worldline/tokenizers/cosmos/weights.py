"""Files of the Cosmos tokenizers: names of tensors, architecture, statistics of latents.

Source: nvidia-cosmos/cosmos-predict1 `tokenizer/networks/`, `tokenizer/training/checkpointer.py`;
huggingface/diffusers `models/autoencoders/autoencoder_kl_cosmos.py`, whose tensors are the same
ones under other names, the levels of the decoder numbered from the coarsest.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, count, takewhile
from pathlib import Path

import torch
from torch import Tensor

from worldline.documents import read_json
from worldline.errors import CheckpointError
from worldline.nn.transforms import EXACT_TAP
from worldline.repositories import holds_diffusers
from worldline.tokenizers.cosmos.model import (
    LEVELS,
    CosmosTokenizer,
    CosmosTokenizerConfig,
    LatentStatistics,
)
from worldline.weights.checkpoint import (
    Checkpoint,
    joined,
    open_checkpoint,
    open_set,
    take_network,
)
from worldline.weights.keymap import KeyMap, matches, renamed_by
from worldline.weights.networks import (
    VAE_LAYOUTS,
    Network,
    find_files,
    last_resorts,
    require_settings,
    shapes_of,
)

# files that a folder may hold, in order of preference
LAYOUTS = (
    ("encoder.safetensors", "decoder.safetensors"),
    ("encoder.jit", "decoder.jit"),
    ("encoder.pt", "decoder.pt"),
    "autoencoder.safetensors",
    "autoencoder.jit",
    "model.safetensors",
    "model.pt",
)
CONFIG = "config.json"  # of diffusers
STATISTICS = ("mean_std.pt", "image_mean_std.pt", "mean_std.safetensors")

# our names to theirs, by rules applied in this order; first the convolutions of a resampler, which
# both number in their order of use
_NUMBERED = {
    r"(encoder.*\.resample)\.space": r"\1.conv1",
    r"(encoder.*\.resample)\.time": r"\1.conv2",
    r"(decoder.*\.resample)\.time": r"\1.conv1",
    r"(decoder.*\.resample)\.space": r"\1.conv2",
    r"resample\.mix": r"resample.conv3",
}
_RELEASED = {
    **_NUMBERED,
    r"(resample\.conv\d)\.": r"\1.conv3d.",
    r"encoder\.levels\.(\d+)\.resample": r"encoder.down.\1.downsample",
    r"decoder\.levels\.(\d+)\.resample": r"decoder.up.\1.upsample",
    r"encoder\.levels": r"encoder.down",
    r"decoder\.levels": r"decoder.up",
    r"\.blocks\.": r".block.",
    r"middle\.block": r"mid.block_",
    r"middle\.spatial_attention": r"mid.attn_1.0",
    r"middle\.temporal_attention": r"mid.attn_1.1",
    r"\.space\.": r".0.conv3d.",
    r"\.time\.": r".1.conv3d.",
    r"\.shortcut\.": r".nin_shortcut.conv3d.",
    r"\.([qkv])\.": r".\1.conv3d.",
    r"\.out\.": r".proj_out.conv3d.",
    r"(norm\w*)\.": r"\1.norm.",
    r"quant_conv\.": r"quant_conv.conv3d.",
}
_DIFFUSERS = {
    **_NUMBERED,
    r"encoder\.levels\.(\d+)\.resample": r"encoder.down_blocks.\1.downsamplers.0",
    r"decoder\.levels\.(\d+)\.resample": r"decoder.up_blocks.\1.upsamplers.0",
    r"encoder\.levels": r"encoder.down_blocks",
    r"decoder\.levels": r"decoder.up_blocks",
    r"\.blocks\.": r".resnets.",
    r"middle\.block1": r"mid_block.resnets.0",
    r"middle\.block2": r"mid_block.resnets.1",
    r"middle\.spatial_attention": r"mid_block.attentions.0",
    r"middle\.temporal_attention": r"mid_block.temp_attentions.0",
    r"\.space\.": r".conv_s.",
    r"\.time\.": r".conv_t.",
    r"\.shortcut\.": r".conv_shortcut.",
    r"\.([qkv])\.": r".to_\1.",
    r"\.out\.": r".to_out.0.",
    r"(norm\w*)\.": r"\1.norm.",
}

FIRST = "encoder.conv_in.space.weight"
ANCHORS = renamed_by(_RELEASED, FIRST), renamed_by(_DIFFUSERS, FIRST)

# files of the 0.1 release's code hold all three convolutions of every resampler
_IDLE = {f"*.{side}sample.conv?.conv3d.*": "it never runs" for side in ("down", "up")}
_DROP = {
    "encoder.patcher3d.*": "wavelet buffers; the tap is read into the configuration",
    "decoder.unpatcher3d.*": "wavelet buffers; the tap is read into the configuration",
    "loss*": "networks of the training loss",
    "quantizer.*": "FSQ tables; the levels are read into the configuration",
    "inv_quant.quantizer.*": "FSQ tables of a decoder file",
    **_IDLE,
}
_LEVELS, _TAPS = "quantizer._levels", "encoder.patcher3d.wavelets"


@dataclass(frozen=True)
class CosmosNetwork(Network[CosmosTokenizerConfig]):
    """A Cosmos tokenizer on disk."""

    @cached_property
    def statistics(self) -> LatentStatistics | None:
        """As `read_statistics`."""
        folder = (*self.beside, self.path)[0].parent
        return read_statistics(folder, self.config.latent_channels)

    def by_names(self, keys: KeyMap) -> Checkpoint:
        view = super().by_names(keys)
        kept = {n: e for n, e in view.entries.items() if keys.ours(n) or not matches(n, _IDLE)}
        return replace(view, entries=kept)


def open_tokenizer(*paths: Path) -> CosmosNetwork:
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
    source = network_view(joined([open_set(file) for file in files], whole))
    if source.kind == "distributed checkpoint":  # which has a folder of its own
        folder = folder.parent
    config, theirs = read_config(source, folder.name), is_diffusers(source)
    beside = tuple(folder / name for name in ((CONFIG,) if theirs else STATISTICS))
    if theirs:
        haar = {"patch_size": config.patch, "patch_type": "haar"}
        require_settings(folder / CONFIG, {"_class_name": "AutoencoderKLCosmos", **haar})
    keys = key_map(config, theirs)
    return CosmosNetwork(CosmosTokenizer, config, source, keys, beside).check()


def tokenizer_files(folder: Path) -> list[Path]:
    """Files of the tokenizer in a folder.

    Raises:
        CheckpointError: there is none, or half of a pair is missing.
    """
    layouts = chain(VAE_LAYOUTS, LAYOUTS, last_resorts(folder))
    return find_files(folder, layouts, "tokenizer", ANCHORS)


def is_diffusers(source: Checkpoint) -> bool:
    """Whether the tensors have diffusers' names."""
    return "encoder.conv_in.conv_s.weight" in source.tensors


def key_map(config: CosmosTokenizerConfig, diffusers: bool = False) -> KeyMap:
    """Map of the bare names of an exported file, or of those in diffusers, to ours."""
    ours, num_levels = shapes_of(CosmosTokenizer, config), len(config.level_channels)
    rename = {_theirs(name, diffusers, num_levels): name for name in ours}
    return KeyMap(rename, {} if diffusers else _DROP)


def _theirs(name: str, diffusers: bool, num_levels: int = 0) -> str:
    """Their name of one of our tensors; `num_levels` matters to diffusers' decoder alone."""
    if diffusers and (match := re.match(r"decoder\.levels\.(\d+)", name)):
        name = f"decoder.levels.{num_levels - 1 - int(match[1])}{name[match.end() :]}"
    return renamed_by(_DIFFUSERS if diffusers else _RELEASED, name)


def read_config(source: Checkpoint, name: str = "") -> CosmosTokenizerConfig:
    """Configuration of a tokenizer, from the shapes and small buffers of its encoder.

    Args:
        source: a whole tokenizer, or its encoder.
        name: the folder's name; decides only what shapes cannot (files of the 0.1 release, and
            whether a file without quantiser buffers is discrete).

    Raises:
        CheckpointError: the tensors are not those of a Cosmos video tokenizer.
    """
    diffusers = is_diffusers(source)

    def shape(ours: str) -> Sequence[int]:
        return source.tensors[_theirs(ours, diffusers)].shape

    def widths(ours: str) -> tuple[int, ...]:
        """First sizes of tensors that are numbered from 0."""
        names = (_theirs(ours.format(number), diffusers) for number in count())
        inside = takewhile(source.tensors.__contains__, names)
        return tuple(source.tensors[name].shape[0] for name in inside)

    try:
        channels, features = shape(FIRST)[:2]
        latent_channels, z_channels = shape("quant_conv.weight")[:2]
        level_channels = widths("encoder.levels.{}.blocks.0.conv1.space.weight")
        space = len(widths("encoder.levels.{}.resample.space.weight"))
        time = len(widths("encoder.levels.{}.resample.time.weight"))
    except (LookupError, ValueError) as error:
        raise CheckpointError(f"{source.path}: not a Cosmos video tokenizer") from error
    patch = round((features / 3) ** (1 / 3))
    spatial, temporal = patch * 2**space, patch * 2**time
    match = re.search(r"[CD]V(\d+)x(\d+)x\d+", name)
    if match and space == time == len(level_channels) - 1:
        temporal, spatial = int(match[1]), int(match[2])  # 0.1: every resampler holds everything
    levels: tuple[int, ...] | None = LEVELS
    if _LEVELS in source.tensors:
        levels = tuple(map(int, source.read(_LEVELS)))
    elif diffusers or re.search(r"CV\d", name) or latent_channels != len(LEVELS):
        levels = None  # diffusers has no discrete one
    return CosmosTokenizerConfig(
        channels=channels,
        level_channels=level_channels,
        num_blocks=len(widths("encoder.levels.0.blocks.{}.conv1.space.weight")),
        patch=patch,
        spatial=spatial,
        temporal=temporal,
        z_channels=z_channels,
        latent_channels=latent_channels,
        levels=levels,
        tap=float(source.read(_TAPS)[0]) if _TAPS in source.tensors else EXACT_TAP,
    )


def network_view(source: Checkpoint) -> Checkpoint:
    """Tensors of the network in a file, by the bare names of an exported one.

    In a training checkpoint its averaged weights have dashes for dots, and are left out.
    """
    return take_network(source, ANCHORS)


def read_statistics(folder: Path, channels: int) -> LatentStatistics | None:
    """Statistics of latents in the folder of a tokenizer's weights; None if it holds none.

    They are in `mean_std.pt` and perhaps `image_mean_std.pt`, in `mean_std.safetensors`, or in the
    `config.json` of diffusers.

    Raises:
        CheckpointError: a file is damaged, or they are of latents with other channels.
    """
    released, images, ours = (folder / name for name in STATISTICS)
    path = next(filter(Path.exists, (released, ours)), folder / CONFIG)
    tensors: dict[str, Tensor] = {}
    if path == released:
        for prefix, file in (("", released), ("image_", images)):
            if file.exists():
                pair = open_checkpoint(file)
                tensors |= {f"{prefix}mean": pair.read("0"), f"{prefix}std": pair.read("1")}
    elif path == ours:
        source = open_checkpoint(ours)
        tensors = {name: source.read(name) for name in source.tensors}
    try:
        if holds_diffusers(folder) and not tensors:
            settings = read_json(path)
            stated = {name: settings.get(f"latents_{name}") for name in ("mean", "std")}
            tensors = {name: torch.tensor(value) for name, value in stated.items() if value}
        if not tensors:
            return None
        for name, tensor in tensors.items():
            if tensor.dim() > 1 and len(tensor) not in (1, channels):
                raise ValueError(f"{name} is {list(tensor.shape)}")
            # many files are flat, channel slowest
            shape = [channels] if name.startswith("image") else [channels, -1]
            tensors[name] = tensor.float().reshape(shape)
        return LatentStatistics(**tensors)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: no statistics of {channels} channels: {error}") from error
