"""Diffusion transformers on disk: what their files have in common.

Two layouts hold the same weights: NVIDIA's file, and the folder of diffusers'
`CosmosTransformer3DModel`. Families name their tensors; the rest is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import AliasChoices, Field

from worldline.errors import CheckpointError
from worldline.nn.dit import PATCH_CELLS
from worldline.weights.checkpoint import Checkpoint
from worldline.weights.keymap import KeyMap
from worldline.weights.networks import Number, Settings, Shapes, read_settings

# bookkeeping that may lie beside the weights
BOOKKEEPING = {
    "*_extra_state": "FP8 bookkeeping of Transformer Engine",
    "*_extra_state.*": "FP8 bookkeeping of Transformer Engine",
}
ATTENTIONS = ("attention", "cross_attention")
SUB_BLOCKS = (*ATTENTIONS, "feed_forward")  # in the order of a block
MODULATION = ((1, "first.weight"), (2, "second.weight"))  # released step -> ours


class DiTSettings(Settings):
    """What no tensor of a diffusion transformer holds, in NVIDIA's config.json or diffusers'."""

    rope_ratio: tuple[Number, Number, Number] | None = Field(
        None, validation_alias=AliasChoices("rope_ratio", "rope_scale")
    )


AnySettings = TypeVar("AnySettings", bound=DiTSettings)


def is_diffusers(source: Checkpoint) -> bool:
    """Whether a transformer's tensors have diffusers' names."""
    theirs = ("patch_embed.", "transformer_blocks.")
    return any(name.startswith(theirs) for name in source.tensors)


def parse_settings(
    kind: type[AnySettings], source: Checkpoint, stated: Mapping[str, Any] | None
) -> AnySettings:
    """Checked settings of a transformer: `stated`, or by None the config.json beside its tensors.

    Raises:
        CheckpointError: a setting has a wrong value, or diffusers' config.json is absent.
    """
    path = source.path.parent / "config.json"
    settings = kind.parse(read_settings(path.parent) if stated is None else stated, path)
    if settings.rope_ratio is None and is_diffusers(source):
        raise CheckpointError(f"{path} is absent, or has no rope_scale")
    return settings


def read_sizes(source: Checkpoint, keys: KeyMap) -> tuple[Shapes, dict[str, Any]]:
    """Shapes of a diffusion transformer, and the sizes they imply, by the names of its config.

    Raises:
        CheckpointError: a tensor is absent or of another kind.
    """
    shapes = Shapes(source, keys, "a Cosmos diffusion transformer of this kind")
    block = "blocks.0.attention"
    width, head_size = shapes.size("embed.weight"), shapes.size(f"{block}.body.q_norm")
    return shapes, {
        "latent_channels": shapes.size("head.linear.weight") // PATCH_CELLS,
        "width": width,
        "head_size": head_size,
        "num_heads": shapes.size(f"{block}.body.q.weight") // head_size,
        "lora_rank": shapes.size(f"{block}.modulation.first.weight"),
        "context_width": shapes.size("blocks.0.cross_attention.body.k.weight", 1),
        "hidden": shapes.size("blocks.0.feed_forward.body.up.weight"),
        "depth": shapes.count("blocks"),
    }


def diffusers_keys(more: Mapping[str, str]) -> KeyMap:
    """Map from diffusers' names to ours; `more` are those of one family alone."""
    theirs, block = "transformer_blocks.{i}", "blocks.{i}"
    rename = {
        **more,
        "patch_embed.proj.weight": "embed.weight",
        "time_embed.t_embedder.linear_1.weight": "noise.first.weight",
        "time_embed.t_embedder.linear_2.weight": "noise.second.weight",
        "time_embed.norm.weight": "noise.norm",
        "proj_out.weight": "head.linear.weight",
        "norm_out.linear_1.weight": "head.modulation.first.weight",
        "norm_out.linear_2.weight": "head.modulation.second.weight",
        f"{theirs}.ff.net.0.proj.weight": f"{block}.feed_forward.body.up.weight",
        f"{theirs}.ff.net.2.weight": f"{block}.feed_forward.body.down.weight",
    }
    for n, ours in enumerate(SUB_BLOCKS, start=1):
        for step, layer in MODULATION:
            rename[f"{theirs}.norm{n}.linear_{step}.weight"] = f"{block}.{ours}.modulation.{layer}"
    for n, ours in enumerate(ATTENTIONS, start=1):
        for leaf in ("q", "k", "v"):
            rename[f"{theirs}.attn{n}.to_{leaf}.weight"] = f"{block}.{ours}.body.{leaf}.weight"
        for leaf in ("q", "k"):
            rename[f"{theirs}.attn{n}.norm_{leaf}.weight"] = f"{block}.{ours}.body.{leaf}_norm"
        rename[f"{theirs}.attn{n}.to_out.0.weight"] = f"{block}.{ours}.body.out.weight"
    return KeyMap(rename)
