"""Diffusion transformers on disk: what their files have in common.

Two layouts hold the same weights: NVIDIA's file, and the folder of diffusers'
`CosmosTransformer3DModel`. Families name their tensors; the rest is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from worldline.errors import CheckpointError
from worldline.weights.keymap import KeyMap
from worldline.weights.networks import (
    Layout,
    NetworkFiles,
    check_network,
    count_blocks,
    read_settings,
    read_shapes,
    require_number,
)
from worldline.weights.source import Checkpoint

Config = TypeVar("Config")
Ratio = tuple[float, float, float]

PATCH = (1, 2, 2)  # of every released model; no tensor tells it
# bookkeeping that may lie beside the weights
BOOKKEEPING = {
    "*_extra_state": "FP8 bookkeeping of Transformer Engine",
    "*_extra_state.*": "FP8 bookkeeping of Transformer Engine",
}
ATTENTIONS = ("attention", "cross_attention")
SUB_BLOCKS = (*ATTENTIONS, "feed_forward")  # in the order of a block
MODULATION = ((1, "first.weight"), (2, "second.weight"))  # released step -> ours
# tensors that fix the architecture -> number of axes; our names
_DECISIVE = {
    "embed.weight": 2,
    "head.linear.weight": 2,
    "blocks.0.attention.modulation.first.weight": 2,
    "blocks.0.attention.body.q.weight": 2,
    "blocks.0.attention.body.q_norm": 1,
    "blocks.0.cross_attention.body.k.weight": 2,
    "blocks.0.feed_forward.body.up.weight": 2,
}


def layout_of(names: Iterable[str]) -> Layout:
    """Layout of a diffusion transformer by the names of its tensors."""
    theirs = ("patch_embed.", "transformer_blocks.")
    return "diffusers" if any(name.startswith(theirs) for name in names) else "nvidia"


def is_dit(names: Iterable[str]) -> bool:
    """Whether tensors of these names are of a diffusion transformer, in either layout."""
    ends = ("x_embedder.proj.1.weight", "patch_embed.proj.weight")
    return any(name.endswith(ends) for name in names)


def check_dit(
    source: Checkpoint,
    settings: Mapping[str, Any] | None,
    layouts: Mapping[Layout, KeyMap],
    network: type[nn.Module],
    read_config: Callable[[Checkpoint, KeyMap, Mapping[str, Any]], Config],
    positions: str | None,
) -> NetworkFiles[Config]:
    """Check a diffusion transformer of either layout; headers only.

    Args:
        source: its tensors.
        settings: content of NVIDIA's `config.json`; None reads the one beside the file.
        layouts: names of tensors -> ours.
        network: built of the config.
        read_config: tensors and settings -> config.
        positions: extra positions that diffusers' config.json must state.

    Raises:
        CheckpointError: it holds adapters, or does not fit.
    """
    if adapters := [name for name in source.tensors if "lora_" in name.lower()]:
        raise CheckpointError(
            f"{source.path} holds LoRA adapters ({len(adapters):,} tensors, such as "
            f"{adapters[0]}); merge them into the weights first"
        )
    layout, folder = layout_of(source.tensors), source.path.parent
    if layout == "diffusers":
        settings = read_diffusers_settings(folder, positions)
    elif settings is None:
        settings = read_settings(folder)
    keys = layouts[layout]
    try:
        config = read_config(source, keys, settings)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{source.path}: {error}") from error
    return check_network(source, keys, config, network, layout)


def read_diffusers_settings(folder: Path, positions: str | None) -> dict[str, Any]:
    """Our settings from the config.json of a diffusers transformer.

    Args:
        folder: with the file.
        positions: extra positions that it must state.

    Raises:
        CheckpointError: it cannot be read, or is of another kind of model.
    """
    settings, path = read_settings(folder), folder / "config.json"
    if "rope_scale" not in settings:
        raise CheckpointError(f"{path} is absent, or has no rope_scale")
    stated = settings.get("extra_pos_embed_type", "learnable")
    if stated != positions:
        raise CheckpointError(
            f"{path}: extra_pos_embed_type is {stated!r}; models of this kind have {positions!r}"
        )
    return {"rope_ratio": settings["rope_scale"]}


def read_sizes(
    source: Checkpoint, keys: KeyMap, decisive: Mapping[str, int]
) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Shapes of a diffusion transformer, and the sizes they imply, by the names of its config.

    Args:
        source: its tensors.
        keys: from their names to ours.
        decisive: our name of a further tensor that there must be -> number of axes.

    Raises:
        CheckpointError: a tensor is absent or of another kind.
    """
    kind = "a Cosmos diffusion transformer of this kind"
    shapes = read_shapes(source, keys, {**_DECISIVE, **decisive}, kind)
    [head_size] = shapes["blocks.0.attention.body.q_norm"]
    return shapes, {
        "depth": count_blocks(shapes, "blocks"),
        "width": shapes["embed.weight"][0],
        "num_heads": shapes["blocks.0.attention.body.q.weight"][0] // head_size,
        "head_size": head_size,
        "hidden": shapes["blocks.0.feed_forward.body.up.weight"][0],
        "context_width": shapes["blocks.0.cross_attention.body.k.weight"][1],
        "lora_rank": shapes["blocks.0.attention.modulation.first.weight"][0],
    }


def read_ratio(source: Checkpoint, value: Any) -> Ratio:
    """Rotary stretching in time, rows and columns.

    Raises:
        CheckpointError: `value` is not three numbers above 0.
    """
    where = f"{source.path}: rope_ratio"
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise CheckpointError(f"{where} is {value!r}; it must be three numbers above 0")
    time, rows, columns = (require_number(number, where) for number in value)
    return time, rows, columns


def renamed_tensors(model: nn.Module, keys: KeyMap) -> dict[str, Tensor]:
    """Parameters by their released names."""
    return {keys.released(name): tensor.detach() for name, tensor in model.named_parameters()}


def diffusers_keys(more: Mapping[str, str]) -> KeyMap:
    """Map from diffusers' names to ours.

    Args:
        more: diffusers' names -> ours, of one family alone.
    """
    block = "transformer_blocks.{i}"
    attentions = list(enumerate(ATTENTIONS, start=1))
    return KeyMap(
        rename={
            **more,
            "patch_embed.proj.weight": "embed.weight",
            "time_embed.t_embedder.linear_1.weight": "noise.first.weight",
            "time_embed.t_embedder.linear_2.weight": "noise.second.weight",
            "time_embed.norm.weight": "noise.norm",
            "proj_out.weight": "head.linear.weight",
            "norm_out.linear_1.weight": "head.modulation.first.weight",
            "norm_out.linear_2.weight": "head.modulation.second.weight",
            f"{block}.ff.net.0.proj.weight": "blocks.{i}.feed_forward.body.up.weight",
            f"{block}.ff.net.2.weight": "blocks.{i}.feed_forward.body.down.weight",
            **{
                f"{block}.norm{n}.linear_{step}.weight": f"blocks.{{i}}.{ours}.modulation.{layer}"
                for n, ours in enumerate(SUB_BLOCKS, start=1)
                for step, layer in MODULATION
            },
            **{
                f"{block}.attn{n}.to_{leaf}.weight": f"blocks.{{i}}.{ours}.body.{leaf}.weight"
                for n, ours in attentions
                for leaf in ("q", "k", "v")
            },
            **{
                f"{block}.attn{n}.to_out.0.weight": f"blocks.{{i}}.{ours}.body.out.weight"
                for n, ours in attentions
            },
            **{
                f"{block}.attn{n}.norm_{leaf}.weight": f"blocks.{{i}}.{ours}.body.{leaf}_norm"
                for n, ours in attentions
                for leaf in ("q", "k")
            },
        }
    )
