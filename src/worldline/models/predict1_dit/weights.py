"""How the released files name the diffusion transformer's tensors, and what their shapes tell.

Two layouts hold the same weights: NVIDIA's `model.pt`, and the folder of diffusers'
`CosmosTransformer3DModel`. Source: nvidia-cosmos/cosmos-predict1 `diffusion/inference/
inference_utils.py`; huggingface/diffusers `scripts/convert_cosmos_to_diffusers.py`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from worldline.errors import CheckpointError
from worldline.files import TRANSFORMER_FILES
from worldline.models.predict1_dit.model import (
    DECODER_RATIO,
    LARGEST_GRID,
    RELEASED_RATIOS,
    DiT,
    DiTConfig,
)
from worldline.shapes import LatentShape
from worldline.weights.keymap import KeyMap, match
from worldline.weights.read import Checkpoint, open_checkpoint
from worldline.weights.shards import shard_stem

logger = logging.getLogger(__name__)

_DROP = {
    "*_extra_state": "FP8 bookkeeping of Transformer Engine",
    "*_extra_state.*": "FP8 bookkeeping of Transformer Engine",
    "pos_embedder.seq": "positions, computed here",
    "logvar.*": "the uncertainty head of training",
}


def _names(layout: Mapping[str, str], block: str) -> dict[str, str]:
    """Join what a layout calls our modules; `layout` maps our names to released ones."""
    named = {}
    for ours, theirs in layout.items():
        inside = ours.startswith("blocks.{i}.")
        named[f"{block}{theirs}" if inside else theirs] = ours
    return named


_NVIDIA_BLOCK = {
    "attention": "blocks.0.block.attn",
    "cross_attention": "blocks.1.block.attn",
    "feed_forward": "blocks.2.block",
}


def _nvidia() -> dict[str, str]:
    layout = {
        "embed.weight": "x_embedder.proj.1.weight",
        "ids.weight": "token_embedder.weight",
        "positions.time": "extra_pos_embedder.pos_emb_t",
        "positions.rows": "extra_pos_embedder.pos_emb_h",
        "positions.columns": "extra_pos_embedder.pos_emb_w",
        "noise.first.weight": "t_embedder.1.linear_1.weight",
        "noise.second.weight": "t_embedder.1.linear_2.weight",
        "noise.norm": "affline_norm.weight",
        "head.linear.weight": "final_layer.linear.weight",
        "head.modulation.first.weight": "final_layer.adaLN_modulation.1.weight",
        "head.modulation.second.weight": "final_layer.adaLN_modulation.2.weight",
    }
    for number, (ours, theirs) in enumerate(_NVIDIA_BLOCK.items()):
        stem = f"blocks.{{i}}.{ours}"
        for step, place in (("1", "first"), ("2", "second")):
            layout[f"{stem}.modulation.{place}.weight"] = (
                f"blocks.{number}.adaLN_modulation.{step}.weight"
            )
        if ours == "feed_forward":
            layout[f"{stem}.body.up.weight"] = f"{theirs}.layer1.weight"
            layout[f"{stem}.body.down.weight"] = f"{theirs}.layer2.weight"
            continue
        for leaf in ("q", "k", "v", "out"):
            layout[f"{stem}.body.{leaf}.weight"] = f"{theirs}.to_{leaf}.0.weight"
        for leaf in ("q", "k"):
            layout[f"{stem}.body.{leaf}_norm"] = f"{theirs}.to_{leaf}.1.weight"
    return _names(layout, "blocks.block{i}.")


def _diffusers() -> dict[str, str]:
    layout = {
        "embed.weight": "patch_embed.proj.weight",
        "positions.time": "learnable_pos_embed.pos_emb_t",
        "positions.rows": "learnable_pos_embed.pos_emb_h",
        "positions.columns": "learnable_pos_embed.pos_emb_w",
        "noise.first.weight": "time_embed.t_embedder.linear_1.weight",
        "noise.second.weight": "time_embed.t_embedder.linear_2.weight",
        "noise.norm": "time_embed.norm.weight",
        "head.linear.weight": "proj_out.weight",
        "head.modulation.first.weight": "norm_out.linear_1.weight",
        "head.modulation.second.weight": "norm_out.linear_2.weight",
    }
    for number, ours in enumerate(_NVIDIA_BLOCK, start=1):
        stem = f"blocks.{{i}}.{ours}"
        layout[f"{stem}.modulation.first.weight"] = f"norm{number}.linear_1.weight"
        layout[f"{stem}.modulation.second.weight"] = f"norm{number}.linear_2.weight"
        if ours == "feed_forward":
            layout[f"{stem}.body.up.weight"] = "ff.net.0.proj.weight"
            layout[f"{stem}.body.down.weight"] = "ff.net.2.weight"
            continue
        for leaf in ("q", "k", "v"):
            layout[f"{stem}.body.{leaf}.weight"] = f"attn{number}.to_{leaf}.weight"
        layout[f"{stem}.body.out.weight"] = f"attn{number}.to_out.0.weight"
        for leaf in ("q", "k"):
            layout[f"{stem}.body.{leaf}_norm"] = f"attn{number}.norm_{leaf}.weight"
    return _names(layout, "transformer_blocks.{i}.")


KEYS = KeyMap(prefixes=("net.", ""), rename=_nvidia(), drop=_DROP)
DIFFUSERS_KEYS = KeyMap(rename=_diffusers())

Layout = Literal["nvidia", "diffusers"]
DIFFUSERS_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
# tensors that tell the architecture -> number of axes; our names
_TELLING = {
    "embed.weight": 2,
    "head.linear.weight": 2,
    "blocks.0.attention.modulation.first.weight": 2,
    "blocks.0.attention.body.q.weight": 2,
    "blocks.0.attention.body.q_norm": 1,
    "blocks.0.cross_attention.body.k.weight": 2,
    "blocks.0.feed_forward.body.up.weight": 2,
}
_POSITIONS = ("positions.time", "positions.rows", "positions.columns")
_BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclass(frozen=True)
class DiTFiles:
    """A diffusion transformer on disk, checked but not read.

    Attributes:
        source: its tensors.
        keys: from their names to ours.
        config: what they imply.
        layout: whose names they are.
    """

    source: Checkpoint
    keys: KeyMap
    config: DiTConfig
    layout: Layout


def open_dit(path: Path, settings: Mapping[str, Any] | None = None) -> DiTFiles:
    """Open a diffusion transformer of either layout; headers only.

    Args:
        path: a released folder, a diffusers folder (the `transformer` folder or the one around it),
            or the file of weights itself.
        settings: of `config.json` beside NVIDIA's file: "rope_ratio" (three numbers: time, rows,
            columns) and "base_fps". Needed where the width is none of the released ones, since no
            tensor holds them.

    Raises:
        CheckpointError: there is none, it is damaged, a tensor does not fit, or the rotary
            stretching is unknown.
    """
    file, layout = find_dit(path)
    source = open_checkpoint(file)
    if adapters := [name for name in source.tensors if "lora_" in name.lower()]:
        raise CheckpointError(
            f"{source.path} holds LoRA adapters ({len(adapters):,} tensors, such as "
            f"{adapters[0]}), which this version does not merge: merge them into the weights first"
        )
    keys = KEYS if layout == "nvidia" else DIFFUSERS_KEYS
    if layout == "diffusers":
        settings = _diffusers_settings(file.parent)
    try:
        config = read_config(source, keys, settings or {})
    except ValueError as error:  # CheckpointError is one: it says which file itself
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{source.path}: {error}") from error
    if "ema" in source.beside:
        logger.info("%s: the averaged weights beside its own are left aside", source.path)
    with torch.device("meta"):
        model = DiT(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    match(source.tensors, expected, keys, str(source.path))
    return DiTFiles(source, keys, config, layout)


def find_dit(path: Path) -> tuple[Path, Layout]:
    """Return the file that `open_dit` opens, and whose layout it has.

    Where a folder has both, NVIDIA's is preferred; of several `iter_*.pt`, which training saves,
    the newest.

    Raises:
        CheckpointError: there is none, or a set is incomplete.
    """
    if path.is_file():
        return path, "diffusers" if path.name.startswith("diffusion_pytorch_model") else "nvidia"
    for name in TRANSFORMER_FILES:
        if (path / name).is_file():
            return path / name, "nvidia"
    saved = [file for file in sorted(path.glob("iter_*.pt")) if shard_stem(file) is None]
    if saved:
        return saved[-1], "nvidia"
    for folder in (path / "transformer", path):
        for name in DIFFUSERS_FILES:
            if (folder / name).is_file():
                return folder / name, "diffusers"
        parts = sorted(folder.glob("diffusion_pytorch_model-*.safetensors"))
        if parts:
            raise CheckpointError(
                f"{folder} is incomplete: it has {parts[0].name}, but not {DIFFUSERS_FILES[1]}"
            )
    raise CheckpointError(
        f"{path} holds no model.pt (nor model.safetensors, nor transformer/{DIFFUSERS_FILES[0]})"
    )


def _diffusers_settings(folder: Path) -> dict[str, Any]:
    """Return ours from the config.json of a diffusers transformer."""
    path = folder / "config.json"
    try:
        given = json.loads(path.read_text())
        ratio = given["rope_scale"]
        positions = given.get("extra_pos_embed_type", "learnable")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read, or has no rope_scale: {error!r}") from error
    if positions != "learnable":
        raise CheckpointError(
            f"{path}: extra_pos_embed_type is {positions!r}; Predict1 models have learnable ones"
        )
    return {"rope_ratio": ratio}


def read_config(source: Checkpoint, keys: KeyMap, settings: Mapping[str, Any]) -> DiTConfig:
    """Return the architecture of a checkpoint; see `open_dit` for `settings`.

    Raises:
        CheckpointError: the tensors are of another model, or the rotary stretching is unknown.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, info in source.tensors.items():
        ours = _ours(keys, name)
        if ours is not None:
            shapes[ours] = info.shape
    decodes = len(shapes.get("ids.weight", ())) == 2
    positions = {} if decodes else dict.fromkeys(_POSITIONS, 2)
    for needed, axes in {**_TELLING, **positions}.items():
        if len(shapes.get(needed, ())) != axes or 0 in shapes[needed]:
            state = f"is {list(shapes[needed])}" if needed in shapes else "is absent"
            raise CheckpointError(
                f"{source.path}: not a Cosmos diffusion transformer "
                f"(tensor {keys.released(needed)} {state})"
            )
    width, features = shapes["embed.weight"]
    [head_size] = shapes["blocks.0.attention.body.q_norm"]
    patch = (1, 2, 2)
    cells = patch[0] * patch[1] * patch[2]
    channels = shapes["head.linear.weight"][0] // cells
    vocabulary, id_width = shapes["ids.weight"] if decodes else (0, 0)
    masks = features / cells - channels - id_width
    if masks not in (1, 2) or (decodes and masks == 2):
        kinds = {"Text2World": channels + 1, "Video2World": channels + 2}
        if decodes:
            kinds = {"a diffusion decoder with these ids": channels + id_width + 1}
        known = ", ".join(f"{name} reads {count * cells}" for name, count in kinds.items())
        raise CheckpointError(
            f"{source.path}: {keys.released('embed.weight')} reads {features} numbers a token; "
            f"{known}"
        )
    return DiTConfig(
        depth=1 + max(int(found[1]) for name in shapes if (found := _BLOCK.match(name))),
        width=width,
        num_heads=shapes["blocks.0.attention.body.q.weight"][0] // head_size,
        head_size=head_size,
        hidden=shapes["blocks.0.feed_forward.body.up.weight"][0],
        context_width=shapes["blocks.0.cross_attention.body.k.weight"][1],
        lora_rank=shapes["blocks.0.attention.modulation.first.weight"][0],
        condition_mask=masks == 2,
        max_grid=LARGEST_GRID if decodes else LatentShape(*(shapes[n][0] for n in _POSITIONS)),
        rope_ratio=_ratio(source, width, settings, decodes=decodes),
        latent_channels=channels,
        out_channels=channels,
        base_fps=float(settings.get("base_fps") or 24.0),
        patch=patch,
        learned_positions=not decodes,
        vocabulary=vocabulary,
        id_width=id_width,
    )


def _ours(keys: KeyMap, name: str) -> str | None:
    try:
        return keys.ours(name)
    except CheckpointError:  # a stranger, which `match` reports
        return None


def _ratio(
    source: Checkpoint, width: int, settings: Mapping[str, Any], *, decodes: bool
) -> tuple[float, float, float]:
    # there is one diffusion decoder alone, whatever its width
    released = DECODER_RATIO if decodes else RELEASED_RATIOS.get(width)
    given = settings.get("rope_ratio", released)
    if given is None:
        known = " or ".join(map(str, RELEASED_RATIOS))
        raise CheckpointError(
            f"{source.path}: a model of width {width} (released ones have {known}) needs its "
            'rotary stretching in config.json beside it: "rope_ratio": [time, rows, columns]'
        )
    good = isinstance(given, list | tuple) and len(given) == 3
    if not good or not all(isinstance(n, int | float) and n > 0 for n in given):
        raise CheckpointError(
            f"{source.path}: rope_ratio is {given!r}; it must be three numbers above 0"
        )
    time, rows, columns = (float(number) for number in given)
    return time, rows, columns


def write_settings(config: DiTConfig) -> dict[str, Any]:
    """Return what config.json must say of `config` for `open_dit` to give it back."""
    return {"rope_ratio": list(config.rope_ratio), "base_fps": config.base_fps}


def released_tensors(model: DiT) -> dict[str, Tensor]:
    """Return the parameters by the names of NVIDIA's `model.pt`."""
    return {KEYS.released(name): tensor.detach() for name, tensor in model.named_parameters()}


def diffusers_config(config: DiTConfig) -> dict[str, Any]:
    """Return the config.json of the same model as diffusers' `CosmosTransformer3DModel`."""
    grid, (_, rows, columns) = config.max_grid, config.patch
    return {
        "_class_name": "CosmosTransformer3DModel",
        "in_channels": config.latent_channels + config.condition_mask,
        "out_channels": config.out_channels,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_size,
        "num_layers": config.depth,
        "mlp_ratio": config.hidden / config.width,
        "text_embed_dim": config.context_width,
        "adaln_lora_dim": config.lora_rank,
        "max_size": [grid.frames, grid.height * rows, grid.width * columns],
        "patch_size": list(config.patch),
        "rope_scale": list(config.rope_ratio),
        "concat_padding_mask": True,
        "extra_pos_embed_type": "learnable",
    }


def diffusers_tensors(model: DiT) -> dict[str, Tensor]:
    """Return the parameters by the names of diffusers' `CosmosTransformer3DModel`."""
    return {
        DIFFUSERS_KEYS.released(name): tensor.detach() for name, tensor in model.named_parameters()
    }
